"""SM-6: lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.conformance.catalogue import CheckSkipped, check, declares
from sequence_mixer.conformance.comparing import compare
from sequence_mixer.conformance.interface import must_raise
from sequence_mixer.conformance.probes import Subject, boundaries, plain_backend, reference_backend
from sequence_mixer.errors import LengthError, MixerError
from sequence_mixer.mixer import SequenceMixer


def lengths(subject: Subject) -> list[int]:
    """1, around a chunk, primes, and the limit if there is one."""
    chunk = min(subject.chunk, 256)
    wanted = {1, 2, 37, chunk - 1, chunk, chunk + 1, 131}
    if subject.max_length is not None:
        wanted = {n for n in wanted if n <= subject.max_length} | {min(subject.max_length, 512)}
    return sorted(n for n in wanted if n >= 1)


@check("SM-6", precision="both")
def check_every_length_is_served(subject: Subject) -> None:
    """T of 1, chunk-1, chunk, chunk+1, a prime and max_length: all outputs finite and those of the reference."""
    able = subject.capabilities
    reference = reference_backend(able)
    for tokens in lengths(subject):

        def plain(at: Subject, mixer: SequenceMixer, tokens: int = tokens) -> dict[str, Tensor]:
            with torch.no_grad():
                y = mixer(at.input(1, tokens))
            subject.require(list(y.shape) == [1, tokens, at.config.d_model], f"T={tokens}: output {list(y.shape)}")
            subject.require(bool(y.isfinite().all()), f"T={tokens}: the output is not finite")
            return {"output": y}

        def exact(at: Subject, mixer: SequenceMixer, tokens: int = tokens) -> dict[str, Tensor]:
            mixer.backend = reference if at.dtype == torch.float64 else plain_backend(able)
            return plain(at, mixer, tokens)

        compare(subject, f"T={tokens}", plain, exact)


@check("SM-6", applies=declares("max_length"))
def check_more_than_max_length_raises(subject: Subject) -> None:
    """One token more than config.max_length raises LengthError, packed too; max_length itself is served."""
    limit = subject.max_length
    if limit is None:
        raise CheckSkipped("this config sets no max_length")
    mixer = subject.build()
    if limit > 4096:
        raise CheckSkipped(f"max_length {limit} is too long for a check")
    x = subject.input(1, limit + 1)
    must_raise(subject, f"{limit + 1} tokens with max_length {limit}", LengthError, lambda: mixer(x))
    if subject.capabilities.varlen and subject.device.type == "cpu":
        whole = boundaries([limit + 1], subject.device)
        must_raise(subject, "a packed sequence that is too long", LengthError, lambda: mixer(x, cu_seqlens=whole))
        mixer(x, cu_seqlens=boundaries([limit, 1], subject.device))


@check("SM-6")
def check_no_tokens_give_an_empty_result_or_an_error_in_words(subject: Subject) -> None:
    """T=0 gives [B,0,D], or an error of the contract."""
    mixer, x = subject.build(), subject.input(2, 0)
    try:
        y = mixer(x)
    except MixerError as error:
        subject.require(bool(str(error)), "T=0 raised without a message")
        return
    subject.require(list(y.shape) == list(x.shape), f"T=0 gave {list(y.shape)}, wanted {list(x.shape)}")

"""What is measured: one mixer, one kind of call, one length; over the registry, without a list of names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sequence_mixer.config import MixerConfig
from sequence_mixer.mixer import SequenceMixer
from zoo.bench.timing import MAX_CALLS
from zoo.build import create, resolve
from zoo.registry import registry

KINDS = ("forward", "train step", "decode")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run.

    lengths: sequence lengths T, rising. tokens: tokens per batch in forward and train step, so B = tokens / T.
    decode_batch: sequences decoded at once. seconds: measuring time per case, if the run's time allows it.
    train_steps, train_context, train_width: optimiser steps, T and D of the smoke run.
    """

    d_model: int
    lengths: tuple[int, ...]
    tokens: int
    decode_batch: int
    seconds: float
    train_steps: int
    train_context: int
    train_width: int

    def changed(self, lengths: tuple[int, ...] | None, d_model: int | None) -> Sizes:
        """The same with the user's lengths and width."""
        changed = self if lengths is None else replace(self, lengths=tuple(sorted(set(lengths))))
        changed = changed if d_model is None else replace(changed, d_model=d_model)
        return replace(changed, tokens=max(changed.tokens, changed.lengths[-1]))


CPU_SIZES = Sizes(128, (128, 256, 512, 1024, 2048, 4096), 4096, 1, 0.35, 60, 128, 64)
CUDA_SIZES = Sizes(2048, (512, 1024, 2048, 4096, 8192, 16384, 32768), 32768, 16, 0.5, 200, 512, 256)


def sizes_for(device: torch.device) -> Sizes:
    """Default sizes: small enough for two CPU cores, large enough to fill a GPU."""
    return CUDA_SIZES if device.type == "cuda" else CPU_SIZES


@dataclass(frozen=True)
class Case:
    """One measurement. batch: B of the call (sequences decoded at once for "decode"). length: T, or past tokens."""

    mixer: str
    kind: str
    length: int
    batch: int

    @property
    def key(self) -> str:
        return f"{self.mixer} | {self.kind} | {self.length}"


def cases(name: str, sizes: Sizes) -> Iterator[Case]:
    """Every case of one registered mixer, as far as its capabilities go, the short lengths first.

    Raises what `config_of` raises.
    """
    able = registry.definition(name).capabilities_of(config_of(name, sizes.d_model, sizes.lengths[0]))
    for length in sizes.lengths:
        for kind in KINDS:
            if kind == "decode" and not able.stateful:
                continue
            batch = sizes.decode_batch if kind == "decode" else max(1, sizes.tokens // length)
            yield Case(name, kind, length, batch)


def config_of(name: str, d_model: int, length: int) -> MixerConfig:
    """The config that is measured: the mixer's defaults at this width; `max_length` is the length, if it has one.

    Raises UnknownMixer, RegistryError, ConfigError.
    """
    fields = registry.definition(name).config.model_fields
    options: dict[str, Any] = {"max_length": length} if "max_length" in fields else {}
    return resolve(name, d_model=d_model, **options)


@dataclass
class Prepared:
    """A call ready to be timed, and what is known of it beforehand.

    flops, bytes: of `forward` at this batch and length, by the mixer's cost model. state_bytes: of the state after
    `length` tokens, 0 for other calls than decode.
    """

    run: Callable[[], Any]
    mixer: SequenceMixer
    flops: int
    bytes: int
    parameters: int
    state_bytes: int


def prepare(case: Case, d_model: int, device: torch.device, dtype: torch.dtype) -> Prepared:
    """Build the mixer and random inputs of a case. One call of `run` is one sample."""
    room = MAX_CALLS if case.kind == "decode" else 0
    torch.manual_seed(0)
    mixer = create(config_of(case.mixer, d_model, case.length + room)).to(device=device, dtype=dtype)
    cost = mixer.cost(case.batch, case.length, dtype)
    x = torch.randn(case.batch, case.length, d_model, device=device, dtype=dtype)
    state_bytes = 0
    if case.kind == "decode":
        run, state_bytes = _decode(mixer, x)
    elif case.kind == "train step":
        run = _train_step(mixer, x)
    else:
        run = _forward(mixer, x)
    return Prepared(run, mixer, cost.flops, cost.bytes, cost.parameters, state_bytes)


def _forward(mixer: SequenceMixer, x: Tensor) -> Callable[[], Any]:
    def run() -> Tensor:
        with torch.no_grad():
            return mixer(x)  # type: ignore[no-any-return]

    return run


def _train_step(mixer: SequenceMixer, x: Tensor) -> Callable[[], Any]:
    x = x.requires_grad_()
    cotangent = torch.randn_like(x)

    def run() -> None:
        mixer(x).backward(cotangent)
        mixer.zero_grad(set_to_none=True)  # here and not before, so that the gradients count as memory of this call
        x.grad = None

    return run


def _decode(mixer: SequenceMixer, x: Tensor) -> tuple[Callable[[], Any], int]:
    """One token after `length` tokens; the state moves on from call to call as in generation.

    Returns the call, and the bytes of a state with room for `length` tokens.
    """
    batch, length = x.shape[:2]
    with torch.no_grad():
        nbytes = mixer.initial_state(batch, capacity=length).nbytes
        empty = mixer.initial_state(batch, capacity=length + MAX_CALLS)
        _, state = mixer.extend(x, empty, donate=True)
    token = x[:, :1].contiguous()
    holder = [state]

    def run() -> None:
        with torch.no_grad():
            holder[0] = mixer.extend(token, holder[0])[1]

    return run, nbytes

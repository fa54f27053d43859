"""SM-8: every declared backend computes the same function."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sequence_mixer.conformance.catalogue import CheckSkipped, check
from sequence_mixer.conformance.comparing import Draw, Values, agree, require_precise, widened, with_gradients
from sequence_mixer.conformance.probes import (
    Subject,
    boundaries,
    plain_backend,
    reference_backend,
    run_pieces,
    why_unusable,
)
from sequence_mixer.definition import BackendSpec
from sequence_mixer.mixer import SequenceMixer

Case = tuple[tuple[int, int], Callable[[SequenceMixer, Tensor], Tensor]]  # (B, T) and the call


def cases(subject: Subject) -> dict[str, Case]:
    """Calls a backend has to serve, as far as the capabilities go."""
    able, tokens = subject.capabilities, subject.length(min(2 * subject.chunk + 5, 149))
    found: dict[str, Case] = {"forward": ((2, tokens), lambda m, x: m(x))}
    if able.varlen:
        lengths = [0, subject.length(7), subject.length(1), 0, subject.length(41)]
        found["packed"] = (
            (1, sum(lengths)),
            lambda m, x: m(x, cu_seqlens=boundaries(lengths, x.device)),
        )
    if able.stateful:
        half = tokens // 2
        found["extend"] = ((2, tokens), lambda m, x: run_pieces(m, x, [half, tokens - half])[0])
    return found


def usable_backends(subject: Subject, besides: str | None) -> list[BackendSpec]:
    """Declared backends that run here; skips if there are none besides `besides`."""
    found, reasons = [], []
    for spec in subject.capabilities.backends:
        why = why_unusable(spec, subject.device, subject.dtype)
        if spec.name == besides:
            continue
        if why is None:
            found.append(spec)
        else:
            reasons.append(f"{spec.name} {why}")
    if not found:
        told = "; ".join(reasons) or "none is declared"
        raise CheckSkipped(f"no backend to compare on {subject.device} in {subject.dtype}: {told}")
    return found


def run_backend(subject: Subject, mixer: SequenceMixer, spec: BackendSpec, case: Case) -> Values:
    """Output and gradients of one call, or the output alone if the backend has no gradients."""
    mixer.backend = spec.name
    (batch, tokens), call = case
    x = subject.input(batch, tokens)
    if spec.training:
        return with_gradients(subject, mixer, x, call)
    with torch.no_grad():
        return {"output": call(mixer, x)}


def compare_backends(subject: Subject, specs: list[BackendSpec]) -> None:
    """Every backend of `specs` against the reference in float64 from the same rounded parameters and inputs."""
    plain_name = plain_backend(subject.capabilities)
    reference = BackendSpec(reference_backend(subject.capabilities))
    for what, case in cases(subject).items():

        def yardsticks(seed: int, case: Case = case) -> tuple[SequenceMixer, Values, Values]:
            mixer = subject.build(seed)
            exact = run_backend(*widened(subject, mixer), reference, case)
            return mixer, exact, run_backend(subject, mixer, BackendSpec(plain_name), case)

        mixer, exact, plain = yardsticks(0)
        require_precise(subject, f"backend {plain_name}, {what}", plain, exact)
        if subject.dtype == torch.float64:
            plain = {}  # its own rounding is what the allowance in float64 is for
        for spec in specs:

            def draw(seed: int, spec: BackendSpec = spec, case: Case = case) -> Draw:
                mixer, exact, plain = yardsticks(seed, case)
                return run_backend(subject, mixer, spec, case), exact, plain

            got = run_backend(subject, mixer, spec, case)
            agree(subject, f"backend {spec.name}, {what}", got, exact, plain, again=draw)


@check("SM-8")
def check_backends_agree_in_float64(subject: Subject) -> None:
    """Every declared backend gives the values and gradients of the reference, at float64's rounding."""
    compare_backends(subject, usable_backends(subject, reference_backend(subject.capabilities)))


@check("SM-8", precision="asked")
def check_backends_agree_with_the_float64_reference(subject: Subject) -> None:
    """Values and gradients of every backend err no more than the plain path does, doubled."""
    compare_backends(subject, usable_backends(subject, None))


@check("SM-8", precision="asked")
def check_scratch_memory_is_never_read(subject: Subject) -> None:
    """With fresh memory filled with NaN, every backend gives the same finite values and gradients."""
    for spec in usable_backends(subject, None):
        mixer = subject.build()
        for what, case in cases(subject).items():
            want = run_backend(subject, mixer, spec, case)
            with fresh_memory_is_nan():
                got = run_backend(subject, mixer, spec, case)
            for name, value in got.items():
                finite = bool(value.isfinite().all())
                subject.require(finite, f"backend {spec.name}, {what}: {name} took up NaN from fresh memory")
                worst = float((value.double() - want[name].double()).abs().max()) if value.numel() else 0.0
                scale = float(want[name].double().abs().max()) if value.numel() else 0.0
                limit = 64 * torch.finfo(subject.dtype).eps * scale + 1e-9
                subject.require(worst <= limit, f"backend {spec.name}, {what}: {name} depends on fresh memory")


@contextlib.contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """torch.empty and its kin give NaN inside."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        memory.fill_uninitialized_memory = filling
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

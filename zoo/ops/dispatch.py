"""Which implementation serves a call to an operator, and why each other one does not. Nothing is silent.

Three choices are kept apart: the operation (a public function of `zoo.ops`), its implementations (registered here by
name: "reference", "chunked", "fft", "triton", or a user's own), and the choice for one call, made by `select`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sequence_mixer.errors import BackendError, suggest

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton's interpreter serves CPU tensors too
FLOATING = ("float64", "float32", "bfloat16", "float16")
_NAMES = {getattr(torch, name): name for name in FLOATING}
_NOTHING = contextlib.nullcontext()


class Spec(Protocol):
    """What an implementation says of itself; `sequence_mixer.BackendSpec` is one."""

    @property
    def name(self) -> str: ...
    @property
    def devices(self) -> Sequence[str]: ...
    @property
    def dtypes(self) -> Sequence[str]: ...
    @property
    def training(self) -> bool: ...
    @property
    def needs(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Serves:
    """Spec of a built-in implementation.

    devices: device types ("cpu", "cuda"), or ("*",) for any.
    dtypes: names of the dtypes of the first input.
    training: True if gradients are served.
    needs: packages that must be importable.
    """

    name: str
    devices: tuple[str, ...] = ("*",)
    dtypes: tuple[str, ...] = FLOATING
    training: bool = True
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Implementation:
    """A registered function. `refuses(**call)` returns the reason why it cannot serve a call, or None."""

    spec: Spec
    fn: Callable[..., Any]
    refuses: Callable[..., str | None] | None
    priority: int
    missing: tuple[str, ...]  # packages of spec.needs that cannot be imported; asked once: a compiler cannot trace it


@dataclass
class Dispatch:
    """One recorded choice: the operator, the implementation that served it, and why the faster ones did not."""

    op: str
    backend: str
    reasons: dict[str, str] = field(default_factory=dict)


_implementations: dict[str, list[Implementation]] = {}
_records: list[list[Dispatch]] = []

REFERENCE, PLAIN, KERNEL, USER = 0, 10, 20, 30  # priorities; "auto" takes the highest that serves


def register_backend(
    op: str,
    spec: Spec,
    fn: Callable[..., Any],
    *,
    refuses: Callable[..., str | None] | None = None,
    priority: int = USER,
) -> None:
    """Add an implementation of operator `op`.

    spec: name, devices, dtypes, training, needs (`sequence_mixer.BackendSpec` or anything with these attributes).
    fn: called with the operator's arguments by position and keyword as the public function passes them on.
    refuses: given the facts of a call as keywords (see the operator), returns a reason or None.
    priority: "auto" takes the implementation with the highest one that serves the call.
    Raises BackendError if `op` already has an implementation of that name.
    """
    known = _implementations.setdefault(op, [])
    if any(entry.spec.name == spec.name for entry in known):
        raise BackendError(f"operator {op!r} already has a backend named {spec.name!r}; choose another name")
    missing = tuple(package for package in spec.needs if importlib.util.find_spec(package) is None)
    known.append(Implementation(spec, fn, refuses, priority, missing))
    known.sort(key=lambda entry: -entry.priority)


def implementation(op: str, name: str) -> Implementation:
    """The implementation of `op` of that name, which it has."""
    return next(entry for entry in _implementations[op] if entry.spec.name == name)


def backends(op: str) -> list[str]:
    """Names of the implementations of `op`, best first."""
    return [entry.spec.name for entry in _implementations.get(op, [])]


def select(
    op: str, backend: str, tensors: Sequence[Tensor | None], facts: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The function that serves this call.

    backend: "auto" for the best that serves, or a name, which then serves the call or raises.
    tensors: the tensor arguments; the first gives device and dtype, any that requires grad makes it a training call.
    facts: what the `refuses` functions of this operator want to know (sizes, options).
    Raises BackendError with the reasons if nothing (or not the one asked for) serves the call.
    """
    known = _implementations.get(op, [])
    reasons: dict[str, str] = {}
    first = tensors[0]
    assert first is not None
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    for entry in known:
        if backend != "auto" and entry.spec.name != backend:
            continue
        why = why_not(entry, first.device.type, first.dtype, training, facts or {})
        if why is None:
            if _records and not torch.compiler.is_compiling():
                _records[-1].append(Dispatch(op, entry.spec.name, dict(reasons)))
            return entry.fn
        reasons[entry.spec.name] = why
    if backend != "auto" and backend not in reasons:
        raise BackendError(
            f"{op} has no backend {backend!r}{suggest(backend, backends(op))}; it has: {', '.join(backends(op))}"
        )
    told = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    hint = " Use backend='auto' to take one that does." if backend != "auto" else ""
    raise BackendError(f"{op}: no backend serves this call. {told}.{hint}")


def why_not(
    entry: Implementation, device: str, dtype: torch.dtype, training: bool, facts: Mapping[str, Any]
) -> str | None:
    """Reason why `entry` cannot serve a call on `device` in `dtype`, or None if it can."""
    spec = entry.spec
    dtype_name = _NAMES.get(dtype) or str(dtype).removeprefix("torch.")
    if entry.missing:
        return f"needs the package {entry.missing[0]!r}, which is not installed"
    interpreted = device == "cpu" and "triton" in spec.needs and INTERPRETING
    if "*" not in spec.devices and device not in spec.devices and not interpreted:
        return f"runs on {', '.join(spec.devices)}, the input is on {device}"
    if dtype_name not in spec.dtypes:
        return f"takes {', '.join(spec.dtypes)}, the input is {dtype_name}"
    if training and not spec.training:
        return "has no gradient, and an input requires one"
    return entry.refuses(**facts) if entry.refuses is not None else None


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context without autocast on the device of `tensor`; costs nothing where it is off, outside a trace."""
    device = tensor.device.type
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


@contextlib.contextmanager
def record_dispatch() -> Iterator[list[Dispatch]]:
    """Record every choice made inside the block (eager mode): operator, backend, reasons of the faster ones."""
    record: list[Dispatch] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)

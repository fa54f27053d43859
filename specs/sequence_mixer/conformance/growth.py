"""SM-15: work and memory grow with T as the declared structure promises."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sequence_mixer.conformance.catalogue import CheckSkipped, check, declares
from sequence_mixer.conformance.cost import counted_flops
from sequence_mixer.conformance.probes import Subject
from sequence_mixer.definition import Capabilities, LowRank, Masked, OneSemiseparable, Semiseparable, Toeplitz
from sequence_mixer.mixer import SequenceMixer

LINEAR, QUADRATIC = 2.3, 4.4  # most that doubling T may multiply by
LONGEST = 1024


def most_growth(capabilities: Capabilities) -> float:
    """Most that doubling T may multiply FLOPs and memory by."""
    fast = (LowRank, OneSemiseparable, Semiseparable, Toeplitz)
    for structure in capabilities.structures:
        kind = structure.mask if isinstance(structure, Masked) else structure
        if isinstance(kind, fast):
            return LINEAR
    return QUADRATIC


def lengths(subject: Subject) -> tuple[int, int]:
    """T and 2T, beyond a chunk, so that the work inside one chunk does not hide how the whole grows."""
    tokens = max(256, 2 * subject.chunk)
    if subject.max_length is not None:
        tokens = min(tokens, subject.max_length // 2)
        if tokens < 2 * subject.chunk and most_growth(subject.capabilities) == LINEAR:
            raise CheckSkipped(f"max_length {subject.max_length} has no room for T and 2T beyond a chunk")
    if tokens < 8:
        raise CheckSkipped("max_length is too short to double")
    if 2 * tokens > 4 * LONGEST:
        raise CheckSkipped(f"chunks of {subject.chunk} tokens are too long for a check")
    return tokens, 2 * tokens


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation inside made, in bytes of its storage."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


def saved_bytes(mixer: SequenceMixer, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward of forward(x), parameters aside, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in mixer.parameters()}
    kept: dict[int, int] = {}
    alive = []  # storages must not be reused while they are counted

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = mixer(x.requires_grad_())
    del y
    return sum(kept.values())


def _require_growth(subject: Subject, what: str, sizes: tuple[int, int], values: tuple[int, int]) -> None:
    most, ratio = most_growth(subject.capabilities), values[1] / max(values[0], 1)
    kind = "linear" if most == LINEAR else "quadratic"
    subject.require(
        ratio <= most,
        f"{what} grew {ratio:.2f}-fold from T={sizes[0]} to T={sizes[1]} ({values[0]} to {values[1]}); "
        f"the declared structures promise {kind} growth, at most {most}",
    )


@check("SM-15")
def check_flops_grow_as_declared(subject: Subject) -> None:
    """Matrix FLOPs of forward from T to 2T: at most 2.3-fold with a fast structure, 4.4-fold without."""
    at, sizes = subject.at(torch.float32), lengths(subject)
    mixer = at.build()
    small, large = (counted_flops(mixer, at.input(1, tokens)) for tokens in sizes)
    _require_growth(subject, "FLOPs", sizes, (small, large))


@check("SM-15")
def check_memory_grows_as_declared(subject: Subject) -> None:
    """The largest tensor, and what is kept for backward, from T to 2T, by the same factors; on CUDA the peak too."""
    at, sizes = subject.at(torch.float32), lengths(subject)
    mixer = at.build()
    largest, saved, peaks = [], [], []
    for tokens in sizes:
        with LargestTensor() as seen, torch.no_grad():
            mixer(at.input(1, tokens))
        largest.append(seen.bytes)
        saved.append(saved_bytes(mixer, at.input(1, tokens)))
        if subject.device.type == "cuda":
            peaks.append(_peak(mixer, at.input(8, tokens)))
    _require_growth(subject, "the largest tensor", sizes, (largest[0], largest[1]))
    _require_growth(subject, "memory kept for backward", sizes, (saved[0], saved[1]))
    if peaks:
        _require_growth(subject, "peak memory", sizes, (peaks[0], peaks[1]))


@check("SM-15", applies=declares("stateful"))
def check_the_state_grows_as_declared(subject: Subject) -> None:
    """A state's bytes from T to 2T tokens: constant with a semiseparable structure, at most doubled without."""
    sizes = subject.length(128) // 2, subject.length(128)
    mixer = subject.build()
    grown = []
    for tokens in sizes:
        with torch.no_grad():
            _, state = mixer.extend(subject.input(1, tokens), mixer.initial_state(1, capacity=tokens))
        grown.append(state.nbytes)
    constant = any(
        isinstance(structure, Semiseparable)
        or (isinstance(structure, Masked) and isinstance(structure.mask, OneSemiseparable))
        for structure in subject.capabilities.structures
    )
    most = 1.0 if constant else LINEAR
    subject.require(
        grown[1] <= most * grown[0],
        f"the state grew from {grown[0]} to {grown[1]} bytes over T={sizes}, at most {most}x",
    )


def _peak(mixer: SequenceMixer, x: Tensor) -> int:
    """Peak bytes of forward and backward above what was allocated before."""
    x.requires_grad_()
    mixer(x).sum().backward()  # compiles kernels, and allocates what stays: workspaces of libraries
    mixer.zero_grad(set_to_none=True)
    x.grad = None
    gc.collect()  # garbage that is freed while the peak is measured would lower it
    torch.cuda.synchronize(x.device)
    base = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    mixer(x).sum().backward()
    torch.cuda.synchronize(x.device)
    peak = torch.cuda.max_memory_allocated(x.device) - base
    mixer.zero_grad(set_to_none=True)
    return int(peak)

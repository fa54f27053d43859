"""What the one-token steps say the same way: they overwrite the state they are given, and have no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.errors import BackendError, DtypeError, StateError
from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.dispatch import backends, implementation, select


def expect_in_place(op: str, scan: str, state: Tensor, dtype: torch.dtype, *inputs: Tensor | None) -> None:
    """Check that `op` may overwrite `state`.

    scan: the differentiable operator that a call which needs gradients is sent to. dtype: that the state must have.
    Raises BackendError if gradients are wanted, DtypeError, StateError if elements of the state share memory.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (state, *inputs)):
        raise BackendError(
            f"{op} overwrites its state and has no gradient, and an input requires one; call it under "
            f"torch.no_grad(), or call {scan} with one token"
        )
    if state.dtype != dtype:
        raise DtypeError(f"state is {state.dtype}, wanted {dtype}: it is overwritten, so it cannot change its dtype")
    if _overlaps(state):
        raise StateError(f"state {list(state.shape)} is expanded: its rows share memory, and a step would mix them")


def may_overwrite(*leaves: Tensor) -> bool:
    """Whether the leaves of a donated state can be written to now.

    Not under gradients, not if elements share memory, and not outside inference mode if they were made in it.
    """
    return not torch.is_grad_enabled() and not any(
        _overlaps(leaf) or (leaf.is_inference() and not torch.is_inference_mode_enabled()) for leaf in leaves
    )


def steps_in_place(
    op: str,
    backend: str,
    state: Tensor,
    x: Tensor,
    *,
    donate: bool,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether a mixer's call may go to the in-place step `op`.

    That takes one token x [B,1,...] for every row, a donated state, no gradients, and a state that can be overwritten.
    dtype: that of the state; the accumulation dtype of x if None.
    """
    return (
        donate
        and x.shape[1] == 1
        and cu_seqlens is None
        and may_overwrite(state)
        and state.dtype == (accumulation_dtype(x.dtype) if dtype is None else dtype)
        and (backend == "auto" or backend in backends(op))
    )


def kernel_steps(op: str, backend: str, x: Tensor, facts: dict[str, int]) -> bool:
    """Whether the kernel serves the step `op` of x: a mixer may then make what the kernel needs in its own way.

    Raises BackendError if `backend` names an implementation that does not serve the call.
    """
    return select(op, backend, (x,), facts) is implementation(op, "triton").fn


def _overlaps(state: Tensor) -> bool:
    return not state.is_contiguous() and any(
        stride == 0 and size > 1 for stride, size in zip(state.stride(), state.shape, strict=True)
    )

"""The semiseparable scan by Triton kernels, as custom operators that compile and differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.kernels.widths import MULTIPLE
from zoo.ops.semiseparable.cost import backward_flops, flops
from zoo.ops.semiseparable.recurrence import one_token

KERNEL_DTYPES = ("float32", "bfloat16", "float16")
WIDEST = 256
HALF = (torch.bfloat16, torch.float16)


def refuses(*, N: int, P: int, **other: object) -> str | None:
    """Why the kernels cannot serve widths N, P, or None."""
    if max(N, P) > WIDEST:
        return f"keeps a state [P, N] of at most {WIDEST} by {WIDEST}, wanted P={P}, N={N}"
    return None


def semiseparable_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `semiseparable`; one token without packing is served by the recurrence itself."""
    batch, tokens, heads, channels = v.shape
    if tokens == 1 and cu_seqlens is None:
        y, final_state = one_token(q, k, v, log_decay, scale, initial_state)
        return y.to(v.dtype), final_state
    if tokens == 0 or batch == 0:
        sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        empty = v.new_zeros(sequences, heads, channels, q.shape[-1], dtype=torch.float32)
        return v.clone(), empty if initial_state is None else initial_state.clone()
    more_n, more_p = missing_widths(v.dtype, q.shape[3], channels)
    if not more_n and not more_p:
        y, final_state = semiseparable_forward(q, k, v, log_decay, scale, initial_state, cu_seqlens)
        return y, final_state
    wider = None if initial_state is None else F.pad(initial_state, (0, more_n, 0, more_p))
    wide_q, wide_k, wide_v = F.pad(q, (0, more_n)), F.pad(k, (0, more_n)), F.pad(v, (0, more_p))
    y, final_state = semiseparable_forward(wide_q, wide_k, wide_v, log_decay, scale, wider, cu_seqlens)
    return y[..., :channels], final_state[:, :, :channels, : q.shape[3]]


def missing_widths(dtype: torch.dtype, N: int, P: int) -> tuple[int, int]:
    """Zeros that have to be added to the widths N and P for the kernels."""
    return (-N % MULTIPLE, -P % MULTIPLE) if dtype in HALF else (0, 0)


@torch.library.custom_op("zoo::semiseparable", mutates_args=())
def semiseparable_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B,T,H,P] in the dtype of v, final state [S,H,P,N] in float32."""
    if v.dtype in HALF:
        from zoo.ops.semiseparable.kernels import walk_scan

        return walk_scan.forward(q, k, v, log_decay, scale, initial_state, cu_seqlens)
    from zoo.ops.semiseparable.kernels import launch

    return launch.forward(q, k, v, log_decay, scale, initial_state, cu_seqlens)


@semiseparable_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = v.new_empty(sequences, v.shape[2], v.shape[3], q.shape[3], dtype=torch.float32)
    return v.new_empty(v.shape), state


@torch.library.custom_op("zoo::semiseparable_backward", mutates_args=())
def semiseparable_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, scale, initial_state; an empty tensor for each that is absent.

    dfinal: None for zeros.
    """
    from zoo.ops.semiseparable.kernels import launch

    return launch.backward(dy, dfinal, q, k, v, log_decay, scale, initial_state, cu_seqlens)


@semiseparable_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    da = v.new_empty(0 if log_decay is None else v.shape[:3], dtype=torch.float32)
    dscale = v.new_empty(0 if scale is None else v.shape[:3], dtype=torch.float32)
    state = v.new_empty(0 if initial_state is None else initial_state.shape, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), da, dscale, state


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    dy = torch.zeros_like(inputs[2]) if dy is None else dy
    gradients = semiseparable_backward(dy, dfinal, *inputs)
    return (*(None if part is None else grad for part, grad in zip(inputs[:6], gradients, strict=True)), None)


semiseparable_forward.register_autograd(_differentiate, setup_context=_save)
for _op, _forward in ((semiseparable_forward, True), (semiseparable_backward, False)):
    refuse_higher_order(_op, "semiseparable (ssd, linear_attention)", has_gradient=_forward)


@flop_formula(torch.ops.zoo.semiseparable)
def _forward_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return flops(v[0], v[1], v[2], q[2], q[3], v[3])


@flop_formula(torch.ops.zoo.semiseparable_backward)
def _backward_flops(
    dy: Sequence[int],
    dfinal: Sequence[int] | None,
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    *args: Any,
    **kw: Any,
) -> int:
    return backward_flops(v[0], v[1], v[2], q[2], q[3], v[3])

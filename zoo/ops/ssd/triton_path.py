"""SSD by Triton kernels: in half precision as custom operators of its own, else around the semiseparable scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.semiseparable.cost import backward_flops, flops
from zoo.ops.semiseparable.triton_path import HALF, missing_widths, semiseparable_triton
from zoo.ops.ssd.scan import add_skip, discretise


def ssd_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `ssd`. A skip per channel, [H,P], is added outside; one per head inside."""
    if x.dtype not in HALF or dt_limit[0] < 0.0 or x.shape[1] < 2 or x.shape[0] == 0:
        step, log_decay = discretise(x, dt, A, dt_bias, dt_softplus, dt_limit)
        y, final_state = semiseparable_triton(C, B, x, log_decay, step, initial_state, cu_seqlens)
        return add_skip(y, x, D), final_state
    low, high = (float(limit) for limit in dt_limit)
    inside, outside = (None, D) if D is not None and D.dim() == 2 else (D, None)
    rest = (dt_bias, dt_softplus, low, high)
    N, P = B.shape[3], x.shape[3]
    more_n, more_p = missing_widths(x.dtype, N, P)
    if more_n or more_p:
        wide_x, wide_B, wide_C = F.pad(x, (0, more_p)), F.pad(B, (0, more_n)), F.pad(C, (0, more_n))
        wider = None if initial_state is None else F.pad(initial_state, (0, more_n, 0, more_p))
        y, final_state = ssd_forward(wide_x, dt, A, wide_B, wide_C, inside, *rest, wider, cu_seqlens)
        y, final_state = y[..., :P], final_state[:, :, :P, :N]
    else:
        y, final_state = ssd_forward(x, dt, A, B, C, inside, *rest, initial_state, cu_seqlens)
    return add_skip(y, x, outside), final_state


def forward_of(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of the custom operator."""
    from zoo.ops.ssd.kernels import segments

    A, D, dt_bias, initial_state = A.float().contiguous(), _float(D), _float(dt_bias), _float(initial_state)
    return segments.forward(x, dt, A, B, C, D, dt_bias, dt_softplus, (low, high), initial_state, cu_seqlens)


@torch.library.custom_op("zoo::ssd", mutates_args=())
def ssd_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B,T,H,P] in the dtype of x, final state [S,H,P,N] in float32. D: [H]."""
    return forward_of(x, dt, A, B, C, D, dt_bias, dt_softplus, low, high, initial_state, cu_seqlens)


@ssd_forward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(sequences, x.shape[2], x.shape[3], B.shape[3], dtype=torch.float32)


@torch.library.custom_op("zoo::ssd_backward", mutates_args=())
def ssd_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, dt_bias, initial_state, in their dtypes; an empty tensor for each absent one.

    dfinal: None for zeros.
    """
    from zoo.ops.semiseparable.kernels import launch as scans
    from zoo.ops.ssd.kernels import wide

    dy = dy.to(x.dtype)
    if wide.serves(x, B):
        found = wide.backward(
            dy, scans.contiguous(dfinal), x, dt, A.float().contiguous(), B, C, _float(D), _float(dt_bias), dt_softplus,
            (low, high), _float(initial_state), cu_seqlens,
        )  # fmt: skip
        *others, dstart = found
        gradients = [
            x.new_empty(0) if part is None or grad is None else grad.to(part.dtype)
            for part, grad in zip((x, dt, A, B, C, D, dt_bias), others, strict=True)
        ]
        return (*gradients, x.new_empty(0, dtype=torch.float32) if dstart is None else dstart)  # type: ignore[return-value]
    raw = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    reached = torch.logaddexp(raw, torch.zeros_like(raw)) if dt_softplus else raw
    step = reached.clamp(low, high)
    dC, dB, dx, da, dscale, dinitial = scans.backward(
        dy, dfinal, C, B, x, step * A.float(), step, initial_state, cu_seqlens
    )
    draw = torch.where((reached >= low) & (reached <= high), dscale + da * A.float(), 0.0)
    draw = draw * raw.sigmoid() if dt_softplus else draw
    ddt = draw.to(dt.dtype).contiguous()  # as the fake says; dt may have another layout
    dA = (da * step).sum((0, 1)).to(A.dtype)
    dbias = x.new_empty(0) if dt_bias is None else draw.sum((0, 1)).to(dt_bias.dtype)
    if D is None:
        return dx, ddt, dA, dB, dC, x.new_empty(0), dbias, dinitial
    dD = (dy.float() * x).sum((0, 1, 3)).to(D.dtype)
    dx = (dx + D.float().unsqueeze(-1) * dy).to(x.dtype)
    return dx, ddt, dA, dB, dC, dD, dbias, dinitial


@ssd_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(part: Tensor | None) -> Tensor:
        return x.new_empty(0) if part is None else part.new_empty(part.shape)

    state = x.new_empty(0 if initial_state is None else initial_state.shape, dtype=torch.float32)
    return like(x), like(dt), like(A), like(B), like(C), like(D), like(dt_bias), state


def _float(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.float().contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *inputs[10:])
    ctx.options = inputs[7:10]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    found = ssd_backward(dy, dfinal, *tensors, *ctx.options, initial_state, cu_seqlens)
    present = [None if part is None else grad for part, grad in zip([*tensors, initial_state], found, strict=True)]
    return *present[:7], None, None, None, present[7], None


ssd_forward.register_autograd(_differentiate, setup_context=_save)
for _op, _forward in ((ssd_forward, True), (ssd_backward, False)):
    refuse_higher_order(_op, "ssd", has_gradient=_forward)


@flop_formula(torch.ops.zoo.ssd)
def _forward_flops(
    x: Sequence[int], dt: Sequence[int], A: Sequence[int], B: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return flops(x[0], x[1], x[2], B[2], B[3], x[3])


@flop_formula(torch.ops.zoo.ssd_backward)
def _backward_flops(
    dy: Sequence[int],
    dfinal: Sequence[int] | None,
    x: Sequence[int],
    dt: Sequence[int],
    A: Sequence[int],
    B: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    return backward_flops(x[0], x[1], x[2], B[2], B[3], x[3])

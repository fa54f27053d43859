"""The inside of an SSD layer as one operator: short convolution with SiLU, SSD and gated norm of one projection.

It runs the kernels of the three operators. What it saves is the joining of gradients: those of z, of x, B, C and of the
time steps are written side by side, where autograd would copy them together. Source: Dao & Gu 2024, arXiv 2405.21060,
section 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.in_place import kernel_steps
from zoo.ops.semiseparable.cost import backward_flops, flops
from zoo.ops.short_convolution.triton_path import UNROLLED
from zoo.ops.ssd.triton_path import forward_of
from zoo.ops.ssd.widths import served


def serves(
    projected: Tensor, channels: int, heads: int, groups: int, modes: int, taps: int, group: int, backend: str
) -> bool:
    """Whether the operator takes the place of the three for `projected` [B,T,W], which all have to go to kernels.

    channels: H P. heads: H. groups: G. modes: N. taps: of the convolution. group: channels of one mean square.
    """
    width = channels // heads
    if projected.dtype != torch.bfloat16 or projected.shape[0] == 0 or projected.shape[1] < 2:
        return False
    if not 2 <= taps <= UNROLLED or not served(width, modes, heads, groups):
        return False
    facts: dict[str, dict[str, int]] = {
        "short_convolution": {"width": taps, "empty": False, "silu": True},
        "ssd": {"N": modes, "P": width},
        "gated_rms_norm": {"group": group, "empty": False},
    }
    return all(kernel_steps(op, backend, projected, known) for op, known in facts.items())


@torch.library.custom_op("zoo::ssd_block", mutates_args=())
def ssd_block(
    projected: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    groups: int,
    modes: int,
    low: float,
    high: float,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The layer between its projections.

    projected: [B,T,H P + (H P + 2 G N) + H], columns of z, of x, B and C, of the time steps. taps: [H P + 2 G N,W],
    bias: [H P + 2 G N], of the convolution. A, D, dt_bias: [H]. weight: [H P], of the norm. initial_state: [S,H,P,N].
    low, high: limits of the time steps. eps, group_size, norm_before_gate: as in `gated_rms_norm`.
    Returns the output [B,T,H P], the convolution's last inputs [S,H P + 2 G N,W-1], the last state [S,H,P,N] in
    float32; for the backward y [B,T,H P] of SSD and what the convolution made, [B,T,H P + 2 G N].
    """
    from zoo.ops.kernels.devices import on_device
    from zoo.ops.norm.kernels.forward import norm_forward
    from zoo.ops.short_convolution.kernels.forward import convolution_forward

    z, xBC, dt = _columns(projected, weight, taps)
    with on_device(projected):
        convolved, last = convolution_forward(xBC, taps, bias, None, cu_seqlens, True)
        x, B, C = _parts(convolved, A, weight, groups, modes)
        y, final = forward_of(x, dt, A, B, C, D, dt_bias, True, low, high, initial_state, cu_seqlens)
        y = y.flatten(2)
        out = norm_forward(y, z, weight, eps, group_size, norm_before_gate)
    return out, last, final, y, convolved


@ssd_block.register_fake
def _(
    projected: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    groups: int,
    modes: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens = projected.shape[:2]
    channels, heads = weight.shape[0], A.shape[0]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out, y = (projected.new_empty(batch, tokens, channels) for _ in range(2))
    last = projected.new_empty(sequences, taps.shape[0], taps.shape[1] - 1)
    final = projected.new_empty(sequences, heads, channels // heads, modes, dtype=torch.float32)
    return out, last, final, y, projected.new_empty(batch, tokens, taps.shape[0])


@torch.library.custom_op("zoo::ssd_block_backward", mutates_args=())
def ssd_block_backward(
    dout: Tensor,
    dlast: Tensor | None,
    dfinal: Tensor | None,
    projected: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    convolved: Tensor,
    groups: int,
    modes: int,
    low: float,
    high: float,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of projected, taps, bias, A, D, dt_bias, weight, initial_state; empty for what did not come.

    dlast, dfinal: None for zeros.
    """
    from zoo.ops.kernels.devices import on_device
    from zoo.ops.norm.kernels.backward import norm_backward
    from zoo.ops.semiseparable.kernels.launch import contiguous
    from zoo.ops.short_convolution.kernels.backward import convolution_backward
    from zoo.ops.ssd.kernels import wide

    dprojected, dconvolved = torch.empty_like(projected), torch.empty_like(convolved)
    dz, dxBC, ddt = _columns(dprojected, weight, taps)
    z, xBC, dt = _columns(projected, weight, taps)
    with on_device(projected):
        dy, _, dweight = norm_backward(dout, y, z, weight, eps, group_size, norm_before_gate, dz)
        x, B, C = _parts(convolved, A, weight, groups, modes)
        dx, dB, dC = _parts(dconvolved, A, weight, groups, modes)
        start = None if initial_state is None else initial_state.float().contiguous()
        _, found_dt, dA, found_B, found_C, dD, dbias, dstart = wide.backward(
            dy.view(x.shape), contiguous(dfinal), x, dt, A.float().contiguous(), B, C, D.float().contiguous(),
            dt_bias.float().contiguous(), True, (low, high), start, cu_seqlens, dx,
        )  # fmt: skip
        for part, found in ((ddt, found_dt), (dB, found_B), (dC, found_C)):
            part.copy_(found)
        _, dtaps, doffset, _ = convolution_backward(dconvolved, dlast, xBC, taps, bias, None, cu_seqlens, True, dxBC)
    assert dD is not None
    assert dbias is not None
    dstart = projected.new_empty(0, dtype=torch.float32) if dstart is None else dstart
    return dprojected, dtaps, doffset, dA.to(A.dtype), dD.to(D.dtype), dbias.to(dt_bias.dtype), dweight, dstart


@ssd_block_backward.register_fake
def _(
    dout: Tensor,
    dlast: Tensor | None,
    dfinal: Tensor | None,
    projected: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    start = projected.new_empty(0 if initial_state is None else initial_state.shape, dtype=torch.float32)
    doffset = projected.new_empty(0) if bias is None else torch.empty_like(bias)
    dA, dD, dbias, dweight = (torch.empty_like(part) for part in (A, D, dt_bias, weight))
    dtaps = taps.new_empty(taps.shape)
    return torch.empty_like(projected), dtaps, doffset, dA, dD, dbias, dweight, start


def _columns(projected: Tensor, weight: Tensor, taps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the columns of z [B,T,H P], of x, B and C [B,T,H P + 2 G N], of the time steps [B,T,H]."""
    channels, convolved = weight.shape[0], taps.shape[0]
    heads = projected.shape[2] - channels - convolved
    z, xBC, dt = projected.split([channels, convolved, heads], dim=2)
    return z, xBC, dt


def _parts(convolved: Tensor, A: Tensor, weight: Tensor, groups: int, modes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views x [B,T,H,P], B and C [B,T,G,N] of what the convolution made."""
    x, B, C = convolved.split([weight.shape[0], groups * modes, groups * modes], dim=2)
    return x.unflatten(2, (A.shape[0], -1)), B.unflatten(2, (groups, modes)), C.unflatten(2, (groups, modes))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, convolved = output[3:]
    ctx.save_for_backward(*inputs[:9], y, convolved)
    ctx.options = inputs[9:]
    ctx.mark_non_differentiable(y, convolved)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dout: Tensor | None, dlast: Tensor | None, dfinal: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dout = torch.zeros_like(tensors[9]) if dout is None else dout
    *found, dstart = ssd_block_backward(dout, dlast, dfinal, *tensors, *ctx.options)
    if tensors[2] is None:
        found[2] = None
    return *found, None if tensors[7] is None else dstart, *[None] * 8


ssd_block.register_autograd(_differentiate, setup_context=_save)
for _op, _forward in ((ssd_block, True), (ssd_block_backward, False)):
    refuse_higher_order(_op, "ssd", has_gradient=_forward)


@flop_formula(torch.ops.zoo.ssd_block)
def _forward_flops(
    projected: Sequence[int], taps: Sequence[int], bias: Sequence[int] | None, A: Sequence[int], D: Sequence[int],
    dt_bias: Sequence[int], weight: Sequence[int], start: Any, ends: Any, groups: int, modes: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    batch, tokens = projected[:2]
    convolution = 2 * batch * tokens * taps[0] * taps[1]
    return convolution + flops(batch, tokens, A[0], groups, modes, weight[0] // A[0])


@flop_formula(torch.ops.zoo.ssd_block_backward)
def _backward_flops(
    dout: Sequence[int], dlast: Any, dfinal: Any, projected: Sequence[int], taps: Sequence[int], bias: Any,
    A: Sequence[int], D: Any, dt_bias: Any, weight: Sequence[int], start: Any, ends: Any, y: Any, convolved: Any,
    groups: int, modes: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    batch, tokens = projected[:2]
    convolution = 4 * batch * tokens * taps[0] * taps[1]
    return convolution + backward_flops(batch, tokens, A[0], groups, modes, weight[0] // A[0])

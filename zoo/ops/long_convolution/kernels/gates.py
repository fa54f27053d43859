"""Gates of the long convolution, applied on the way between [B,T,D] and the layout with the tokens last."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.rows import cdiv

TILE = 64


@triton.jit
def _place(T, B, D: tl.constexpr, TILE: tl.constexpr):
    """Row of the batch, tokens [TILE] and channels [TILE] of this program, all int64."""
    across: tl.constexpr = (D + TILE - 1) // TILE
    part = tl.program_id(0).to(tl.int64)
    d = part % across * TILE + tl.arange(0, TILE)
    along = (T + TILE - 1) // TILE
    part = part // across
    t = part % along * TILE + tl.arange(0, TILE)
    return part // along, t, d


@launched(do_not_specialize=["B"])
def time_last_kernel(
    x_ptr, gate_ptr, out_ptr,  # [B,T,D] by strides, twice; [D,B,length] contiguous
    T, length, B, x_stride_b, x_stride_t, gate_stride_b, gate_stride_t,
    D: tl.constexpr, HAS_GATE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program owns TILE tokens of TILE channels: out[d,b,t] = x[b,t,d] gate[b,t,d], 0 beyond T."""
    b, t, d = _place(length, B, D, TILE)
    mask = (t < T)[:, None] & (d < D)[None, :]
    value = tl.load(x_ptr + b * x_stride_b + t[:, None] * x_stride_t + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_ptr + b * gate_stride_b + t[:, None] * gate_stride_t + d[None, :], mask=mask, other=0.0)
        value *= gate.to(tl.float32)
    kept = (t < length)[:, None] & (d < D)[None, :]
    tl.store(out_ptr + (d[None, :] * B + b) * length + t[:, None], value.to(out_ptr.dtype.element_ty), mask=kept)


@launched(do_not_specialize=["B"])
def time_first_kernel(
    x_ptr, gate_ptr, second_gate_ptr,  # [D,B,T] by strides, tokens contiguous; [B,T,D] by strides, twice
    out_ptr, second_ptr,  # [B,T,D] contiguous
    T, B, x_stride_d, x_stride_b, gate_stride_b, gate_stride_t, second_stride_b, second_stride_t,
    D: tl.constexpr, HAS_GATE: tl.constexpr, HAS_SECOND: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The other way: out[b,t,d] = x[d,b,t] gate[b,t,d], and with a second gate second[b,t,d] likewise."""
    b, t, d = _place(T, B, D, TILE)
    mask = (t < T)[:, None] & (d < D)[None, :]
    value = tl.load(x_ptr + d[None, :] * x_stride_d + b * x_stride_b + t[:, None], mask=mask, other=0.0).to(tl.float32)
    at = (b * T + t[:, None]) * D + d[None, :]
    if HAS_SECOND:
        gate = tl.load(
            second_gate_ptr + b * second_stride_b + t[:, None] * second_stride_t + d[None, :], mask=mask, other=0.0
        )
        tl.store(second_ptr + at, (value * gate.to(tl.float32)).to(second_ptr.dtype.element_ty), mask=mask)
    if HAS_GATE:
        gate = tl.load(gate_ptr + b * gate_stride_b + t[:, None] * gate_stride_t + d[None, :], mask=mask, other=0.0)
        value *= gate.to(tl.float32)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask)


def time_last(x: Tensor, gate: Tensor | None, dtype: torch.dtype, length: int | None = None) -> Tensor:
    """x [B,T,D], times gate [B,T,D] if there is one, as [D,B,T] in `dtype`; with zeros after it, as [D,B,length]."""
    B, T, D = x.shape
    length = length or T
    out = torch.empty((D, B, length), dtype=dtype, device=x.device)
    x, gate = _channels_last(x), None if gate is None else _channels_last(gate)
    with on_device(x):
        time_last_kernel[_grid(B, length, D)](
            x, gate, out, T, length, B, *_steps(x), *_steps(gate),
            D=D, HAS_GATE=gate is not None, TILE=TILE, num_warps=8,
        )  # fmt: skip
    return out


def time_first(x_t: Tensor, gate: Tensor | None, dtype: torch.dtype, second: Tensor | None = None) -> list[Tensor]:
    """x_t [D,B,T] as [B,T,D] in `dtype`, times gate if there is one; and times `second` if there is one."""
    D, B, T = x_t.shape
    x_t = x_t if x_t.stride(2) == 1 else x_t.contiguous()
    gate, second = (None if part is None else _channels_last(part) for part in (gate, second))
    outs = [torch.empty((B, T, D), dtype=dtype, device=x_t.device) for _ in range(1 if second is None else 2)]
    with on_device(x_t):
        time_first_kernel[_grid(B, T, D)](
            x_t, gate, second, outs[0], outs[-1], T, B, x_t.stride(0), x_t.stride(1), *_steps(gate), *_steps(second),
            D=D, HAS_GATE=gate is not None, HAS_SECOND=second is not None, TILE=TILE, num_warps=8,
        )  # fmt: skip
    return outs


def _grid(B: int, T: int, D: int) -> tuple[int]:
    return (B * cdiv(T, TILE) * cdiv(D, TILE),)


def _channels_last(part: Tensor) -> Tensor:
    """`part` [B,T,D], copied if its channels are not contiguous."""
    return part if part.stride(2) == 1 else part.contiguous()


def _steps(part: Tensor | None) -> list[int]:
    return [0, 0] if part is None else list(part.stride()[:2])

"""Bias and GELU between the two products of the token MLP, forward and backward, in one pass over memory each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.rows import cdiv

BLOCK_ROWS, BLOCK_D = 4, 512  # rows are hidden units of one sequence; 16 elements per thread of 4 warps


@triton.jit
def _gelu_and_slope(a, TANH: tl.constexpr):
    """gelu(a) and its derivative, float32; 0.5 (1 + tanh(u)) is sigmoid(2 u)."""
    if TANH:
        share = tl.sigmoid(1.5957691216057308 * a * (1.0 + 0.044715 * a * a))
        slope = share + a * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * a * a)
    else:
        share = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
        slope = share + a * tl.exp(-0.5 * a * a) * 0.3989422804014327
    return a * share, slope


@launched
def _bias_gelu_fwd(
    before_ptr, bias_ptr, hidden_ptr,  # [B,E,D] [E] -> [B,F,D], F >= E
    R, E, F, D, column_blocks, before_stride, hidden_stride,  # R = B F; strides of the batch
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_ROWS rows and BLOCK_D channels."""
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = (tl.program_id(0) % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    b, e = row // F, row % F
    held, in_d = (row < R) & (e < E), (d < D)[None, :]
    at = before_ptr + (b * before_stride + e * D)[:, None] + d[None, :]
    a = tl.load(at, mask=held[:, None] & in_d, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_D]
    if HAS_BIAS:
        a += tl.load(bias_ptr + e, mask=held, other=0.0).to(tl.float32)[:, None]
    hidden, _ = _gelu_and_slope(a, TANH)
    hidden = tl.where((e < E)[:, None], hidden, tl.where(e == E, 1.0, 0.0)[:, None])
    at = hidden_ptr + (b * hidden_stride + e * D)[:, None] + d[None, :]
    tl.store(at, hidden.to(hidden_ptr.dtype.element_ty), mask=(row < R)[:, None] & in_d)


@launched
def _bias_gelu_bwd(
    gradient_ptr, before_ptr, bias_ptr,  # [B,E,D], of the hidden values, overwritten by that of `before`; [B,E,D] [E]
    hidden_ptr, partial_ptr,  # -> [B,E,D], [B,E,column blocks]
    R, E, D, column_blocks,  # R = B E
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_ROWS rows and BLOCK_D channels, and their share of the bias's gradient."""
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    block = tl.program_id(0) % column_blocks
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < R)[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    a = tl.load(before_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_D]
    if HAS_BIAS:
        a += tl.load(bias_ptr + row % E, mask=row < R, other=0.0).to(tl.float32)[:, None]
    hidden, slope = _gelu_and_slope(a, TANH)
    dbefore = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32) * slope
    tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)
    tl.store(gradient_ptr + at, dbefore.to(gradient_ptr.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        tl.store(partial_ptr + row * column_blocks + block, tl.sum(dbefore, axis=1), mask=row < R)


def bias_gelu(before: Tensor, bias: Tensor | None, hidden: Tensor, tanh: bool) -> None:
    """Write gelu(before + bias) to `hidden`: before [B,E,D], bias [E] or None -> hidden [B,F,D], F >= E.

    Rows of `before` and `hidden` follow each other without gaps; they may be the same memory. Behind the E rows comes
    one of ones, which meets the bias of the next product, and zeros.
    """
    batch, units, channels = before.shape
    rows, column_blocks = batch * hidden.shape[1], cdiv(channels, BLOCK_D)
    _bias_gelu_fwd[(cdiv(rows, BLOCK_ROWS) * column_blocks,)](
        before, _vector(bias, before), hidden, rows, units, hidden.shape[1], channels, column_blocks,
        before.stride(0), hidden.stride(0), **_options(bias, tanh),
    )  # fmt: skip


def bias_gelu_backward(gradient: Tensor, before: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """The hidden values again, [B,E,D], and the gradient of the bias, float32 [E] (0 without one).

    gradient: that of the hidden values, [B,E,D]; that of `before` is written over it. Both contiguous.
    """
    hidden = torch.empty_like(before)
    sizes = _sizes(before)
    shape = (0,) if bias is None else (*before.shape[:2], sizes[-1])
    partial = torch.empty(shape, dtype=torch.float32, device=before.device)
    _bias_gelu_bwd[_grid(before)](
        gradient, before, _vector(bias, before), hidden, partial, *sizes, **_options(bias, tanh)
    )
    return hidden, partial.sum((0, 2)) if bias is not None else partial


def _sizes(before: Tensor) -> tuple[int, int, int, int]:
    batch, units, channels = before.shape
    return batch * units, units, channels, cdiv(channels, BLOCK_D)


def _grid(before: Tensor) -> tuple[int]:
    rows, _, _, column_blocks = _sizes(before)
    return (cdiv(rows, BLOCK_ROWS) * column_blocks,)


def _vector(bias: Tensor | None, stand_in: Tensor) -> Tensor:
    return stand_in if bias is None else bias.contiguous()


def _options(bias: Tensor | None, tanh: bool) -> dict[str, object]:
    sizes = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_D": BLOCK_D, "num_warps": 4}
    return {"HAS_BIAS": bias is not None, "TANH": tanh, **sizes}

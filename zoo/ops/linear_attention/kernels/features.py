"""Feature maps of linear attention: one pass over queries or keys, one over their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.rows import cdiv, next_power_of_2, rows
from zoo.ops.linear_attention.kernels.step import feature

TILE = 4096  # elements of a program, 16 in each of 256 threads


@triton.jit
def slope(x, MAP: tl.constexpr):
    """phi'(x), float32; at 0 of the two one-sided slopes the one that PyTorch takes."""
    if MAP == "elu_plus_one":
        x = tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == "relu":
        x = tl.where(x > 0, 1.0, 0.0)
    elif MAP == "silu":
        share = tl.sigmoid(x)
        x = share * (1.0 + x * (1.0 - share))
    elif MAP == "squared_relu":
        x = 2.0 * tl.maximum(x, 0.0)
    else:
        x = tl.full(x.shape, 1.0, tl.float32)
    return x


@launched
def feature_kernel(
    x_ptr, dphi_ptr, out_ptr,  # [B,T,H,N] of any strides but the last, [B T,H N] contiguous, [B T,H N] contiguous
    count, T, x_stride_b, x_stride_t, x_stride_h,  # count: B T
    WIDTH: tl.constexpr, N: tl.constexpr, FLAT: tl.constexpr, MAP: tl.constexpr, GRADIENT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """phi(x), or dphi times phi'(x), of ROWS tokens x BLOCK of their WIDTH = H N elements. FLAT: heads side by side."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (column < WIDTH)[None, :]
    token = row // T * x_stride_b + row % T * x_stride_t
    if FLAT:
        place = column.to(tl.int64)
    else:
        place = column // N * x_stride_h + column % N
    x = tl.load(x_ptr + token[:, None] + place[None, :], mask=inside, other=0.0).to(tl.float32)
    at = row[:, None] * WIDTH + column[None, :]
    if GRADIENT:
        made = tl.load(dphi_ptr + at, mask=inside, other=0.0).to(tl.float32) * slope(x, MAP)
    else:
        made = feature(x, MAP)
    tl.store(out_ptr + at, made.to(out_ptr.dtype.element_ty), mask=inside)


def launch(x: Tensor, dphi: Tensor | None, name: str) -> Tensor:
    """phi(x), or with `dphi` the gradient of x, [B,T,H,N] contiguous, in the dtype of x."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    x = rows(x)
    tokens, heads, width = x.shape[1:]
    block = min(next_power_of_2(heads * width), TILE)
    count = TILE // block
    with on_device(x):
        feature_kernel[(cdiv(x.shape[0] * tokens, count), cdiv(heads * width, block))](
            x, out if dphi is None else dphi.contiguous(), out,
            x.shape[0] * tokens, tokens, x.stride(0), x.stride(1), x.stride(2),
            WIDTH=heads * width, N=width, FLAT=x.stride(2) == width or heads == 1, MAP=name,
            GRADIENT=dphi is not None, ROWS=count, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return out

"""Products of two tensors element by element, and both gradients in one pass over three."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.rows import cdiv, rows

BLOCK_T, BLOCK_D = 4, 1024


@triton.jit
def tile_of(T, D, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row of the batch (int64), tokens [BLOCK_T,1] (int64) and channels [1,BLOCK_D] of this program; which exist."""
    across = tl.cdiv(D, BLOCK_D)
    along = tl.cdiv(T, BLOCK_T)
    d = tl.program_id(0) % across * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    part = (tl.program_id(0) // across).to(tl.int64)
    t = part % along * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    return part // along, t, d, (t < T) & (d < D)


@launched
def product_kernel(
    a_ptr, b_ptr, out_ptr,  # [B,T,D] by strides, twice -> [B,T,D]
    T, D, a_stride_b, a_stride_t, b_stride_b, b_stride_t, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a tile of a b."""
    row, t, d, mask = tile_of(T, D, BLOCK_T, BLOCK_D)
    a = tl.load(a_ptr + row * a_stride_b + t * a_stride_t + d, mask=mask).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride_b + t * b_stride_t + d, mask=mask).to(tl.float32)
    tl.store(out_ptr + (row * T + t) * D + d, (a * b).to(out_ptr.dtype.element_ty), mask=mask)


@launched
def product_gradient_kernel(
    g_ptr, a_ptr, b_ptr, da_ptr, db_ptr,  # [B,T,D] by strides, three times -> [B,T,D] twice
    T, D, g_stride_b, g_stride_t, a_stride_b, a_stride_t, b_stride_b, b_stride_t,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a tile of g b and of g a."""
    row, t, d, mask = tile_of(T, D, BLOCK_T, BLOCK_D)
    g = tl.load(g_ptr + row * g_stride_b + t * g_stride_t + d, mask=mask).to(tl.float32)
    a = tl.load(a_ptr + row * a_stride_b + t * a_stride_t + d, mask=mask).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride_b + t * b_stride_t + d, mask=mask).to(tl.float32)
    at = (row * T + t) * D + d
    tl.store(da_ptr + at, (g * b).to(da_ptr.dtype.element_ty), mask=mask)
    tl.store(db_ptr + at, (g * a).to(db_ptr.dtype.element_ty), mask=mask)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, [B,T,D] contiguous."""
    batch, tokens, channels = a.shape
    a, b = rows(a), rows(b)
    out = torch.empty((batch, tokens, channels), dtype=a.dtype, device=a.device)
    with on_device(a):
        product_kernel[(batch * cdiv(tokens, BLOCK_T) * cdiv(channels, BLOCK_D),)](
            a, b, out, tokens, channels, *a.stride()[:2], *b.stride()[:2],
            BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=4,
        )  # fmt: skip
    return out


def product_gradients(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """g b and g a, [B,T,D] contiguous."""
    batch, tokens, channels = a.shape
    g, a, b = rows(g), rows(a), rows(b)
    da, db = (torch.empty((batch, tokens, channels), dtype=a.dtype, device=a.device) for _ in range(2))
    with on_device(a):
        product_gradient_kernel[(batch * cdiv(tokens, BLOCK_T) * cdiv(channels, BLOCK_D),)](
            g, a, b, da, db, tokens, channels, *g.stride()[:2], *a.stride()[:2], *b.stride()[:2],
            BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=4,
        )  # fmt: skip
    return da, db

"""Gradients of the values of all tokens of a chunk at once from those of the states at its end.

The product with the state of the next head runs while the weights of this one are made. Triton lets it, because it is
last in the loop and its result is not touched before the other product has been waited for; which is why that stands
inside an fma (a sum would become the accumulator of the other product).
"""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import dot
from zoo.ops.semiseparable.kernels.chunks import Chunks, place_of, tile, token_rows

MOST = tl.constexpr(127.0)  # log2 of a weight; it is finite where there is none, and the scores are 0 there


@launched(do_not_specialize=["T", "PER_SEQUENCE", "COUNT"])
def values_kernel(
    dy_ptr, B_ptr, C_ptr, s_ptr, r_ptr, R_ptr, D_ptr, dx_ptr, table_ptr,
    T, PER_SEQUENCE, COUNT, dy_stride, B_stride, C_stride, dx_stride,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BLOCK_Q: tl.constexpr,
    HEADS: tl.constexpr, HAS_D: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK_Q rows of one chunk for HEADS heads of one group.

    dx_j = dt_j (2^(e-s_j) R^T B_j + sum_{i>=j} 2^(s_i-s_j) <C_i,B_j> dy_i) + D dy_j. B C^T is made once for all heads.
    """
    parts: tl.constexpr = (H // HEADS) * (Q // BLOCK_Q)
    chunk = tl.program_id(0) // parts
    h0 = tl.program_id(0) % parts // (Q // BLOCK_Q) * HEADS
    j = tl.program_id(0) % (Q // BLOCK_Q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i = tl.arange(0, Q)
    first, live = place_of(chunk, table_ptr, T, PER_SEQUENCE, Q, PACKED)
    B = tile(B_ptr, first, live, B_stride, h0 // (H // G) * N, j, N)
    C = tile(C_ptr, first, live, C_stride, h0 // (H // G) * N, i, N)
    scores = tl.where(j[:, None] <= i[None, :], dot(B, tl.trans(C)), 0.0)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    behind = dot(B, tl.load(R_ptr + ((chunk.to(tl.int64) * H + h0) * N + n[:, None]) * P + p[None, :]))
    sums = (h0.to(tl.int64) * COUNT + chunk) * Q
    reach = tl.load(s_ptr + sums + Q - 1) - tl.load(r_ptr + sums + j)
    for k in range(0, HEADS):
        h = h0 + k
        later = tl.minimum(h + 1, H - 1)
        dy = tile(dy_ptr, first, live, dy_stride, h * P, i, P)
        R = tl.load(R_ptr + ((chunk.to(tl.int64) * H + later) * N + n[:, None]) * P + p[None, :])
        sums = (later.to(tl.int64) * COUNT + chunk) * Q
        r_later = tl.load(r_ptr + sums + j)
        last_later = tl.load(s_ptr + sums + Q - 1)
        sums = (h.to(tl.int64) * COUNT + chunk) * Q
        r = tl.load(r_ptr + sums + j)
        s = tl.load(s_ptr + sums + i)
        w = tl.exp2(tl.minimum(s[None, :] - r[:, None], MOST)) * scores
        if HAS_D:  # the skip rides on the diagonal
            w += tl.where(j[:, None] == i[None, :], tl.load(D_ptr + h), 0.0)
        dx = tl.fma(behind, tl.broadcast_to(tl.exp2(reach)[:, None], [BLOCK_Q, P]), dot(w.to(dy.dtype), dy))
        reach = last_later - r_later
        behind = dot(B, R)
        at = (first + j[:, None]) * dx_stride + h * P + p[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=(j < live)[:, None])


def values(
    chunks: Chunks, dy: Tensor, B: Tensor, C: Tensor, s: Tensor, r: Tensor, R: Tensor, D: Tensor | None,
    options: dict[str, int], dx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dx [B,T,H,P], contiguous, or written into `dx`, whose tokens lie at one stride. D: float32 [H]."""
    (heads, channels), (groups, modes) = dy.shape[2:], B.shape[2:]
    if dx is None:
        dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    (dy, dy_stride), (B, B_stride), (C, C_stride) = token_rows(dy), token_rows(B), token_rows(C)
    share, block = math.gcd(options["HEADS"], heads // groups), min(options["BLOCK_Q"], chunks.size)
    values_kernel[(chunks.count * (heads // share) * (chunks.size // block),)](
        dy, B, C, s, r, R, s if D is None else D, dx, chunks.table,
        chunks.tokens, chunks.per_sequence, chunks.count, dy_stride, B_stride, C_stride, dx.stride(1),
        H=heads, G=groups, N=modes, P=channels, Q=chunks.size, BLOCK_Q=block, HEADS=share,
        HAS_D=D is not None, PACKED=chunks.packed,
        num_warps=options["num_warps"], num_stages=options["num_stages"],
    )  # fmt: skip
    return dx

"""What the backward of synthetic attention knows of each query: delta, and in float32 the share of its weights.

delta_i = sum_j w_ij dw_ij is a sum over outputs too, and half precision takes it from there. In float32 it is the mean
of dw under the weights that the tiles of ds have: only then do dw and delta cancel at queries that see few keys. An
error that all weights have in common, from the rounding of the log-sum-exp, would else leave its product with delta
in ds, however small ds is. The sum that makes it a mean also normalises the weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.primitives import dot, exponential
from zoo.ops.softmax_attention.kernels.tiles import strides, tiles_of
from zoo.ops.synthetic_attention.kernels.operands import Operands, Stats, table_sizes
from zoo.ops.synthetic_attention.kernels.spans import load_rows, outer_logits, span


@triton.jit
def _synthetic_row_stats(
    v_ptr, q_ptr, k_ptr, table_ptr, left_ptr, right_ptr,  # as in the forward
    dy_ptr, lse_ptr, delta_ptr, share_ptr,  # dy like y; -> delta and share like lse
    spans_ptr, tiles_ptr,  # [S,5] [2,M]
    S, M, table_rows, table_columns,
    v_stride_b, v_stride_t, v_stride_h, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    left_stride_b, left_stride_t, left_stride_h, right_stride_b, right_stride_t, right_stride_h,
    table_stride_h, table_stride_i, dy_stride_b, dy_stride_t, dy_stride_h, lse_stride_b, lse_stride_h,
    CAUSAL: tl.constexpr,
    HAS_INNER: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_OUTER: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, A: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns delta and share of BLOCK_Q queries of one head of one sequence."""
    head = tl.program_id(1).to(tl.int64)
    s = tl.load(tiles_ptr + tl.program_id(0))
    tile = tl.load(tiles_ptr + M + tl.program_id(0))
    q_first, q_length, k_first, k_length, offset = span(spans_ptr, s, s < S)
    i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_q = i < q_length
    row, position = q_first + i, i + offset
    p, n, a, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_C)
    if HAS_INNER:
        q = load_rows(q_ptr + s * q_stride_b + head * q_stride_h, row, q_stride_t, n, N, in_q)
    if HAS_OUTER:
        left = load_rows(left_ptr + s * left_stride_b + head * left_stride_h, row, left_stride_t, a, A, in_q)
        right = load_rows(right_ptr + s * right_stride_b + head * right_stride_h, row, right_stride_t, c, C, in_q)
    dy = load_rows(dy_ptr + s * dy_stride_b + head * dy_stride_h, row, dy_stride_t, p, P, in_q)
    stat_at = s * lse_stride_b + head * lse_stride_h + row
    lse = tl.load(lse_ptr + stat_at, mask=in_q, other=float("inf"))
    sums = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)  # of each lane, so that few terms follow on each other
    products = sums
    k_stop = k_length
    if CAUSAL:
        k_stop = tl.minimum(k_stop, (tile + 1) * BLOCK_Q + offset)
    k_at = k_ptr + s * k_stride_b + head * k_stride_h
    v_at = v_ptr + s * v_stride_b + head * v_stride_h
    table_at = table_ptr + head * table_stride_h + position * table_stride_i
    in_table = (position >= 0) & (position < table_rows)
    for start in range(0, k_stop, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        in_k = j < k_length
        col = k_first + j
        sees = in_q[:, None] & in_k[None, :]
        if CAUSAL:
            sees = sees & (j[None, :] <= position[:, None])
        logits = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        if HAS_INNER:
            logits = dot(q, tl.trans(load_rows(k_at, col, k_stride_t, n, N, in_k)))
        if HAS_OUTER:
            of_left, of_right = outer_logits(left, right, j, COLUMNS, BLOCK_A, BLOCK_C)
            logits += of_left * of_right
        if HAS_TABLE:
            there = sees & in_table[:, None] & (j < table_columns)[None, :]
            logits += tl.load(table_at[:, None] + j[None, :], mask=there, other=0.0).to(tl.float32)
        logits = tl.where(sees, logits, float("-inf"))  # [BLOCK_Q, BLOCK_K]
        v = tl.load(v_at + col[None, :] * v_stride_t + p[:, None], mask=in_k[None, :] & (p < P)[:, None], other=0.0)
        weights = exponential(logits - lse[:, None], v_ptr.dtype.element_ty == tl.float32)
        sums += weights
        products += weights * dot(dy, v)
    total = tl.sum(sums, axis=1)
    share = 1.0 / tl.where(total > 0.0, total, 1.0)
    tl.store(delta_ptr + stat_at, tl.sum(products, axis=1) * share, mask=in_q)
    tl.store(share_ptr + stat_at, share, mask=in_q)


def row_stats(given: Operands, dy: Tensor, y: Tensor, lse: Tensor, spans: Tensor, causal: bool, packed: bool) -> Stats:
    """What the weights and gradients of rows of logits are made of; lse float32 [B,H,Tq], contiguous."""
    if dy.dtype != torch.float32:
        delta = (dy.to(torch.float32) * y.to(torch.float32)).sum(-1).transpose(1, 2).contiguous()
        return Stats(lse, delta, dy)
    stats = Stats(lse, torch.empty_like(lse), torch.empty_like(lse))
    batch, queries, heads, _ = dy.shape
    block, warps = given.blocks()
    tiles, programs = tiles_of(spans[:, 1], batch * queries, block)
    _synthetic_row_stats[(programs, heads)](
        *given.pointers(), dy, *stats, spans, tiles, spans.shape[0], programs, *table_sizes(given.table),
        *given.all_strides(packed), *strides(dy, packed), *stats.strides(packed), CAUSAL=causal,
        **given.sizes(), BLOCK_Q=block, BLOCK_K=block, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return stats

"""Backward of synthetic attention for what belongs to keys: k and v. Tiles are built with keys as rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.primitives import add_product, dot
from zoo.ops.softmax_attention.kernels.tiles import strides, tiles_of
from zoo.ops.synthetic_attention.kernels.operands import Operands, Stats, fresh_like, table_sizes
from zoo.ops.synthetic_attention.kernels.spans import load_rows, normalised, outer_logits_by_key, span


@triton.jit
def _synthetic_bwd_keys(
    v_ptr, q_ptr, k_ptr, table_ptr, left_ptr, right_ptr,  # as in the forward
    dy_ptr, lse_ptr, delta_ptr, share_ptr, dk_ptr, dv_ptr,  # dy like y, delta and share like lse; gradients contiguous
    spans_ptr, tiles_ptr,  # [S,5] [2,M]
    S, M, table_rows, table_columns,
    v_stride_b, v_stride_t, v_stride_h, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    left_stride_b, left_stride_t, left_stride_h, right_stride_b, right_stride_t, right_stride_h,
    table_stride_h, table_stride_i, dy_stride_b, dy_stride_t, dy_stride_h, lse_stride_b, lse_stride_h,
    rows_per_batch, H, CAUSAL: tl.constexpr,
    HAS_INNER: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_OUTER: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, A: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns the gradients of BLOCK_K keys and values of one head of one sequence."""
    head = tl.program_id(1).to(tl.int64)
    s = tl.load(tiles_ptr + tl.program_id(0))
    tile = tl.load(tiles_ptr + M + tl.program_id(0))
    q_first, q_length, k_first, k_length, offset = span(spans_ptr, s, s < S)
    j = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = j < k_length
    col = k_first + j
    p, n, a, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_C)
    v = load_rows(v_ptr + s * v_stride_b + head * v_stride_h, col, v_stride_t, p, P, in_k)
    dv = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    dv_lost = dv
    if HAS_INNER:
        k = load_rows(k_ptr + s * k_stride_b + head * k_stride_h, col, k_stride_t, n, N, in_k)
        dk = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
        dk_lost = dk
    q_at = q_ptr + s * q_stride_b + head * q_stride_h
    left_at = left_ptr + s * left_stride_b + head * left_stride_h
    right_at = right_ptr + s * right_stride_b + head * right_stride_h
    dy_at = dy_ptr + s * dy_stride_b + head * dy_stride_h
    stat_at = s * lse_stride_b + head * lse_stride_h
    table_at = table_ptr + head * table_stride_h + j
    q_start = tile * 0
    if CAUSAL:  # the first query that sees the first key of this tile, rounded down to a tile
        q_start = tl.maximum(tile * BLOCK_K - offset, 0) // BLOCK_Q * BLOCK_Q
    for start in range(q_start, q_length, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        in_q = i < q_length
        row, position = q_first + i, i + offset
        sees = in_k[:, None] & in_q[None, :]
        if CAUSAL:
            sees = sees & (j[:, None] <= position[None, :])
        logits = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
        if HAS_INNER:
            q = load_rows(q_at, row, q_stride_t, n, N, in_q)
            logits = dot(k, tl.trans(q))
        if HAS_OUTER:
            left = load_rows(left_at, row, left_stride_t, a, A, in_q)
            right = load_rows(right_at, row, right_stride_t, c, C, in_q)
            of_left, of_right = outer_logits_by_key(left, right, j, COLUMNS, BLOCK_A, BLOCK_C)
            logits += of_left * of_right
        if HAS_TABLE:
            in_table = (position >= 0) & (position < table_rows)
            there = sees & in_table[None, :] & (j < table_columns)[:, None]
            at = table_at[:, None] + (position * table_stride_i)[None, :]
            logits += tl.load(at, mask=there, other=0.0).to(tl.float32)
        dy = load_rows(dy_at, row, dy_stride_t, p, P, in_q)
        lse = tl.load(lse_ptr + stat_at + row, mask=in_q, other=float("inf"))
        delta = tl.load(delta_ptr + stat_at + row, mask=in_q, other=0.0)
        logits = tl.where(sees, logits, float("-inf"))  # [BLOCK_K, BLOCK_Q]
        weights = normalised(logits, lse, share_ptr, stat_at + row, in_q, 1)
        dv, dv_lost = add_product(dv, dv_lost, weights.to(dy.dtype), dy)
        if HAS_INNER:
            ds = weights * (dot(v, tl.trans(dy)) - delta[None, :])
            dk, dk_lost = add_product(dk, dk_lost, ds.to(q.dtype), q)
    line = (s * rows_per_batch + col) * H + head  # of the contiguous gradients
    at = dv_ptr + line[:, None] * P + p[None, :]
    tl.store(at, dv.to(dv_ptr.dtype.element_ty), mask=in_k[:, None] & (p < P)[None, :])
    if HAS_INNER:
        at = dk_ptr + line[:, None] * N + n[None, :]
        tl.store(at, dk.to(dk_ptr.dtype.element_ty), mask=in_k[:, None] & (n < N)[None, :])


def backward_keys(
    given: Operands, dy: Tensor, stats: Stats, spans: Tensor, causal: bool, packed: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, contiguous, as wide as they are in `given`."""
    batch, keys, heads, _ = given.v.shape
    dk, dv = fresh_like(given.k, given.v), fresh_like(given.v, given.v)
    block, warps = given.blocks()
    tiles, programs = tiles_of(spans[:, 3], batch * keys, block)
    _synthetic_bwd_keys[(programs, heads)](
        *given.pointers(), dy, *stats, dk, dv,
        spans, tiles, spans.shape[0], programs, *table_sizes(given.table),
        *given.all_strides(packed), *strides(dy, packed), *stats.strides(packed),
        0 if packed else keys, heads,
        CAUSAL=causal, **given.sizes(), BLOCK_Q=block, BLOCK_K=block, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return dk, dv

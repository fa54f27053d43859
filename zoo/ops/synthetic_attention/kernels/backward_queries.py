"""Backward of synthetic attention for what belongs to queries: q, left and right."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.primitives import add_product, dot
from zoo.ops.softmax_attention.kernels.tiles import strides, tiles_of
from zoo.ops.synthetic_attention.kernels.operands import Operands, Stats, fresh_like, table_sizes
from zoo.ops.synthetic_attention.kernels.spans import load_rows, normalised, outer_logits, picks, span


@triton.jit
def _synthetic_bwd_queries(
    v_ptr, q_ptr, k_ptr, table_ptr, left_ptr, right_ptr,  # as in the forward
    dy_ptr, lse_ptr, delta_ptr, share_ptr, dq_ptr, dleft_ptr, dright_ptr,  # dy like y, delta and share like lse
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
    """One program owns the gradients of BLOCK_Q queries of one head of one sequence."""
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
        dq = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
        dq_lost = dq
    if HAS_OUTER:
        left = load_rows(left_ptr + s * left_stride_b + head * left_stride_h, row, left_stride_t, a, A, in_q)
        right = load_rows(right_ptr + s * right_stride_b + head * right_stride_h, row, right_stride_t, c, C, in_q)
        dleft = tl.zeros([BLOCK_Q, BLOCK_A], tl.float32)
        dright = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
        dleft_lost, dright_lost = dleft, dright
    dy = load_rows(dy_ptr + s * dy_stride_b + head * dy_stride_h, row, dy_stride_t, p, P, in_q)
    stat_at = s * lse_stride_b + head * lse_stride_h + row
    lse = tl.load(lse_ptr + stat_at, mask=in_q, other=float("inf"))
    delta = tl.load(delta_ptr + stat_at, mask=in_q, other=0.0)
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
            k = load_rows(k_at, col, k_stride_t, n, N, in_k)
            logits = dot(q, tl.trans(k))
        if HAS_OUTER:
            of_left, of_right = outer_logits(left, right, j, COLUMNS, BLOCK_A, BLOCK_C)
            logits += of_left * of_right
        if HAS_TABLE:
            there = sees & in_table[:, None] & (j < table_columns)[None, :]
            logits += tl.load(table_at[:, None] + j[None, :], mask=there, other=0.0).to(tl.float32)
        logits = tl.where(sees, logits, float("-inf"))  # [BLOCK_Q, BLOCK_K]
        v = tl.load(v_at + col[None, :] * v_stride_t + p[:, None], mask=in_k[None, :] & (p < P)[:, None], other=0.0)
        dw = dot(dy, v)
        weights = normalised(logits, lse, share_ptr, stat_at, in_q, 0)
        ds = weights * (dw - delta[:, None])
        if HAS_INNER:
            dq, dq_lost = add_product(dq, dq_lost, ds.to(k.dtype), k)
        if HAS_OUTER:
            pick_left = picks((j // COLUMNS)[:, None] == a[None, :], left)
            pick_right = picks((j % COLUMNS)[:, None] == c[None, :], right)
            dleft, dleft_lost = add_product(dleft, dleft_lost, (ds * of_right).to(left.dtype), pick_left)
            dright, dright_lost = add_product(dright, dright_lost, (ds * of_left).to(right.dtype), pick_right)
    line = (s * rows_per_batch + row) * H + head  # of the contiguous gradients
    if HAS_INNER:
        at = dq_ptr + line[:, None] * N + n[None, :]
        tl.store(at, dq.to(dq_ptr.dtype.element_ty), mask=in_q[:, None] & (n < N)[None, :])
    if HAS_OUTER:
        at = dleft_ptr + line[:, None] * A + a[None, :]
        tl.store(at, dleft.to(dleft_ptr.dtype.element_ty), mask=in_q[:, None] & (a < A)[None, :])
        at = dright_ptr + line[:, None] * C + c[None, :]
        tl.store(at, dright.to(dright_ptr.dtype.element_ty), mask=in_q[:, None] & (c < C)[None, :])


def backward_queries(
    given: Operands, dy: Tensor, stats: Stats, spans: Tensor, causal: bool, packed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, left and right, contiguous, as wide as they are in `given`."""
    made = (fresh_like(given.q, given.v), fresh_like(given.left, given.v), fresh_like(given.right, given.v))
    if given.q is None and given.left is None:
        return made
    batch, queries, heads, _ = dy.shape
    block, warps = given.blocks()
    tiles, programs = tiles_of(spans[:, 1], batch * queries, block)
    _synthetic_bwd_queries[(programs, heads)](
        *given.pointers(), dy, *stats, *made,
        spans, tiles, spans.shape[0], programs, *table_sizes(given.table),
        *given.all_strides(packed), *strides(dy, packed), *stats.strides(packed),
        0 if packed else queries, heads, CAUSAL=causal,
        **given.sizes(), BLOCK_Q=block, BLOCK_K=block, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return made

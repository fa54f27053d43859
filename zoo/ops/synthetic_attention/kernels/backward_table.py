"""Backward of synthetic attention for the table, summed over the sequences inside a program: no atomics, no copies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.primitives import dot
from zoo.ops.kernels.rows import cdiv
from zoo.ops.softmax_attention.kernels.tiles import strides
from zoo.ops.synthetic_attention.kernels.operands import Operands, Stats
from zoo.ops.synthetic_attention.kernels.spans import load_rows, normalised, outer_logits, span


@triton.jit
def _synthetic_bwd_table(
    v_ptr, q_ptr, k_ptr, table_ptr, left_ptr, right_ptr,  # as in the forward
    dy_ptr, lse_ptr, delta_ptr, share_ptr, dtable_ptr, spans_ptr,  # delta, share like lse; -> [H,Lq,Lk]; [S,5]
    S, table_rows, table_columns,
    v_stride_b, v_stride_t, v_stride_h, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    left_stride_b, left_stride_t, left_stride_h, right_stride_b, right_stride_t, right_stride_h,
    table_stride_h, table_stride_i, dy_stride_b, dy_stride_t, dy_stride_h, lse_stride_b, lse_stride_h,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    HAS_INNER: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_OUTER: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, A: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_Q by BLOCK_K entries of the table of one head; hidden tiles become 0.

    PACKED: sequences differ in length, and those that do not reach the tile are skipped.
    """
    head = tl.program_id(1).to(tl.int64)
    tiles_k = tl.cdiv(table_columns, BLOCK_K)
    q_tile, k_tile = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    position = q_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    in_table = (position < table_rows)[:, None] & (j < table_columns)[None, :]
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    entries = table_ptr + head * table_stride_h + position.to(tl.int64)[:, None] * table_stride_i + j[None, :]
    learned = tl.load(entries, mask=in_table, other=0.0).to(tl.float32)
    dtable = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    lost = dtable
    sequences = S
    if CAUSAL:
        sequences = tl.where(k_tile * BLOCK_K < (q_tile + 1) * BLOCK_Q, S, 0)
    for s in range(0, sequences):
        q_first, q_length, k_first, k_length, offset = span(spans_ptr, s, s < S)
        i = position - offset  # the query of this sequence that stands there
        reaches = True
        if PACKED:
            begins, ends = q_tile * BLOCK_Q - offset < q_length, (q_tile + 1) * BLOCK_Q - offset > 0
            reaches = begins & ends & (k_tile * BLOCK_K < k_length)
        if reaches:
            at_s = tl.cast(s, tl.int64)
            in_q, in_k = (i >= 0) & (i < q_length) & (position < table_rows), j < k_length
            row, col = q_first + i, k_first + j
            sees = in_q[:, None] & in_k[None, :]
            if CAUSAL:
                sees = sees & (j[None, :] <= position[:, None])
            logits = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
            if HAS_INNER:
                q = load_rows(q_ptr + at_s * q_stride_b + head * q_stride_h, row, q_stride_t, n, N, in_q)
                k_at = k_ptr + at_s * k_stride_b + head * k_stride_h
                k = tl.load(
                    k_at + col[None, :] * k_stride_t + n[:, None], mask=in_k[None, :] & (n < N)[:, None], other=0.0
                )
                logits = dot(q, k)
            if HAS_OUTER:
                left_at = left_ptr + at_s * left_stride_b + head * left_stride_h
                right_at = right_ptr + at_s * right_stride_b + head * right_stride_h
                left = load_rows(left_at, row, left_stride_t, tl.arange(0, BLOCK_A), A, in_q)
                right = load_rows(right_at, row, right_stride_t, tl.arange(0, BLOCK_C), C, in_q)
                of_left, of_right = outer_logits(left, right, j, COLUMNS, BLOCK_A, BLOCK_C)
                logits += of_left * of_right
            stat_at = at_s * lse_stride_b + head * lse_stride_h + row
            lse = tl.load(lse_ptr + stat_at, mask=in_q, other=float("inf"))
            delta = tl.load(delta_ptr + stat_at, mask=in_q, other=0.0)
            logits = tl.where(sees, logits + learned, float("-inf"))  # added up as in the forward
            weights = normalised(logits, lse, share_ptr, stat_at, in_q, 0)
            dy = load_rows(dy_ptr + at_s * dy_stride_b + head * dy_stride_h, row, dy_stride_t, p, P, in_q)
            v_at = v_ptr + at_s * v_stride_b + head * v_stride_h
            v = tl.load(v_at + col[None, :] * v_stride_t + p[:, None], mask=in_k[None, :] & (p < P)[:, None], other=0.0)
            ds = weights * (dot(dy, v) - delta[:, None]) - lost
            grown = dtable + ds
            lost = (grown - dtable) - ds  # a large batch is a long sum (Kahan)
            dtable = grown
    at = dtable_ptr + (head * table_rows + position[:, None]) * table_columns + j[None, :]
    tl.store(at, dtable, mask=in_table)


def backward_table(given: Operands, dy: Tensor, stats: Stats, spans: Tensor, causal: bool, packed: bool) -> Tensor:
    """Gradient of the table, float32 [H,Lq,Lk], contiguous."""
    assert given.table is not None
    heads, rows, columns = given.table.shape
    dtable = torch.empty((heads, rows, columns), dtype=torch.float32, device=dy.device)
    block, warps = given.blocks()
    grid = (cdiv(rows, block) * cdiv(columns, block), heads)
    _synthetic_bwd_table[grid](
        *given.pointers(), dy, *stats, dtable, spans, spans.shape[0], rows, columns,
        *given.all_strides(packed), *strides(dy, packed), *stats.strides(packed),
        CAUSAL=causal, PACKED=packed, **given.sizes(), BLOCK_Q=block, BLOCK_K=block, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return dtable

"""Forward of synthetic attention: one pass over the keys with a running maximum; logits are made tile by tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.primitives import dot, exponential
from zoo.ops.kernels.widths import cut_width
from zoo.ops.softmax_attention.kernels.tiles import strides, tiles_of
from zoo.ops.synthetic_attention.kernels.operands import operands, table_sizes
from zoo.ops.synthetic_attention.kernels.spans import load_rows, outer_logits, span


@triton.jit
def _synthetic_fwd(
    v_ptr, q_ptr, k_ptr, table_ptr, left_ptr, right_ptr,  # [B,Tk,H,P] [B,Tq,H,N] [B,Tk,H,N] [H,Lq,Lk] [B,Tq,H,A|B]
    y_ptr, lse_ptr,  # -> [B,Tq,H,P] [B,H,Tq]
    spans_ptr, tiles_ptr,  # [S,5] [2,M]
    S, M, table_rows, table_columns,
    v_stride_b, v_stride_t, v_stride_h, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    left_stride_b, left_stride_t, left_stride_h, right_stride_b, right_stride_t, right_stride_h,
    table_stride_h, table_stride_i, y_stride_b, y_stride_t, y_stride_h, lse_stride_b, lse_stride_h,
    CAUSAL: tl.constexpr,
    HAS_INNER: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_OUTER: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, A: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_Q queries of one head of one sequence."""
    head = tl.program_id(1).to(tl.int64)
    s = tl.load(tiles_ptr + tl.program_id(0))
    tile = tl.load(tiles_ptr + M + tl.program_id(0))
    q_first, q_length, k_first, k_length, offset = span(spans_ptr, s, s < S)
    i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_q = i < q_length
    row, position = q_first + i, i + offset
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    if HAS_INNER:
        q = load_rows(q_ptr + s * q_stride_b + head * q_stride_h, row, q_stride_t, n, N, in_q)
    if HAS_OUTER:
        a, c = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_C)
        left = load_rows(left_ptr + s * left_stride_b + head * left_stride_h, row, left_stride_t, a, A, in_q)
        right = load_rows(right_ptr + s * right_stride_b + head * right_stride_h, row, right_stride_t, c, C, in_q)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)  # running maximum
    total = tl.zeros([BLOCK_Q], tl.float32)
    y = tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)
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
            k = tl.load(k_at + col[None, :] * k_stride_t + n[:, None], mask=in_k[None, :] & (n < N)[:, None], other=0.0)
            logits = dot(q, k)
        if HAS_OUTER:
            of_left, of_right = outer_logits(left, right, j, COLUMNS, BLOCK_A, BLOCK_C)
            logits += of_left * of_right
        if HAS_TABLE:
            there = sees & in_table[:, None] & (j < table_columns)[None, :]
            logits += tl.load(table_at[:, None] + j[None, :], mask=there, other=0.0).to(tl.float32)
        logits = tl.where(sees, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        level = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = exponential(logits - level[:, None], v_ptr.dtype.element_ty == tl.float32)
        shrink = exponential(top - level, v_ptr.dtype.element_ty == tl.float32)
        total = total * shrink + tl.sum(weights, axis=1)
        v = load_rows(v_at, col, v_stride_t, p, P, in_k)
        y = dot(weights.to(v.dtype), v, y * shrink[:, None])
        top = new_top
    alive = total > 0.0
    total = tl.where(alive, total, 1.0)
    y = y / total[:, None]
    lse = tl.where(alive, top + tl.log(total), float("inf"))
    y_at = y_ptr + s * y_stride_b + head * y_stride_h + row[:, None] * y_stride_t + p[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=in_q[:, None] & (p < P)[None, :])
    tl.store(lse_ptr + s * lse_stride_b + head * lse_stride_h + row, lse, mask=in_q)


def synthetic_forward(
    v: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    table: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    spans: Tensor,
    queries: int,
    causal: bool,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """y [B,Tq,H,P] and the log-sum-exp float32 [B,H,Tq]; see `triton_path` for the arguments."""
    given = operands(v, q, k, table, left, right)
    batch, _, heads, width = given.v.shape
    y = torch.empty((batch, queries, heads, width), dtype=v.dtype, device=v.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=v.device)
    block, warps = given.blocks()
    tiles, programs = tiles_of(spans[:, 1], batch * queries, block)
    _synthetic_fwd[(programs, heads)](
        *given.pointers(), y, lse, spans, tiles, spans.shape[0], programs, *table_sizes(given.table),
        *given.all_strides(packed), *strides(y, packed), 0 if packed else lse.stride(0), lse.stride(1),
        CAUSAL=causal, **given.sizes(), BLOCK_Q=block, BLOCK_K=block, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return cut_width(y, v.shape[3]), lse

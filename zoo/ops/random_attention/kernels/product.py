"""The products of random attention: one for the whole batch, in both directions, without tiles that nothing sees.

With w the weights [H,Tq,Tk], 0 where hidden, and columns (b, p) of the whole batch: y = w v, dv = w^T dy. For the table
dw = dy v^T summed over the batch, and dtable = w (dw - delta) with delta_i = sum_j w_ij dw_ij. In half precision delta
comes from the outputs, as sum_bp dy y; in float32 from dw itself, since only then do both cancel to the last bit. No
atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.primitives import add_product
from zoo.ops.kernels.rows import cdiv
from zoo.ops.kernels.widths import cut_width
from zoo.ops.random_attention.kernels.tiles import row_block, tiles_for
from zoo.ops.softmax_attention.kernels.tiles import wide_rows


@triton.jit
def _mix(
    w_ptr, v_ptr, y_ptr,  # [H,Tq,Tk] [B,Tk,H,P] -> [B,Tq,H,P]
    Tq, Tk, N, v_stride_b, v_stride_t, v_stride_h, y_stride_b, y_stride_t, y_stride_h,
    P: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M queries and BLOCK_N columns (b, p) of one head; long rows come first."""
    head = tl.program_id(1).to(tl.int64)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.cdiv(Tq, BLOCK_M) - 1 - tl.program_id(0) // tiles_n
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, p = (column // P).to(tl.int64), column % P
    in_q, in_n = i < Tq, column < N
    w_at = w_ptr + head * Tq * Tk + i.to(tl.int64) * Tk
    v_at = v_ptr + head * v_stride_h + b * v_stride_b + p
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lost = y
    stop = Tk
    if CAUSAL:
        stop = tl.minimum(Tk, (tile + 1) * BLOCK_M + Tk - Tq)
    for start in range(0, stop, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        in_k = j < Tk
        w = tl.load(w_at[:, None] + j[None, :], mask=in_q[:, None] & in_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        row = j.to(tl.int64) * v_stride_t
        v = tl.load(v_at[None, :] + row[:, None], mask=in_k[:, None] & in_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        y, lost = add_product(y, lost, w, v)
    y_at = y_ptr + head * y_stride_h + i.to(tl.int64)[:, None] * y_stride_t + (b * y_stride_b + p)[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=in_q[:, None] & in_n[None, :])


@triton.jit
def _mix_bwd_values(
    w_ptr, dy_ptr, dv_ptr,  # [H,Tq,Tk] [B,Tq,H,P] -> [B,Tk,H,P]
    Tq, Tk, N, dy_stride_b, dy_stride_t, dy_stride_h, dv_stride_b, dv_stride_t, dv_stride_h,
    P: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M keys and BLOCK_N columns (b, p) of one head; keys that many see come first."""
    head = tl.program_id(1).to(tl.int64)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    j = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, p = (column // P).to(tl.int64), column % P
    in_k, in_n = j < Tk, column < N
    w_at = w_ptr + head * Tq * Tk + j
    dy_at = dy_ptr + head * dy_stride_h + b * dy_stride_b + p
    dv = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lost = dv
    begin = tile * 0
    if CAUSAL:  # the first query that sees the first key of this tile, rounded down to a step
        begin = tl.maximum(tile * BLOCK_M - (Tk - Tq), 0) // BLOCK_K * BLOCK_K
    for start in range(begin, Tq, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        in_q = i < Tq
        row = i.to(tl.int64)
        w = tl.load(
            w_at[:, None] + (row * Tk)[None, :], mask=in_k[:, None] & in_q[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K], transposed
        dy = tl.load(
            dy_at[None, :] + (row * dy_stride_t)[:, None], mask=in_q[:, None] & in_n[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_N]
        dv, lost = add_product(dv, lost, w, dy)
    dv_at = dv_ptr + head * dv_stride_h + j.to(tl.int64)[:, None] * dv_stride_t + (b * dv_stride_b + p)[None, :]
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=in_k[:, None] & in_n[None, :])


@triton.jit
def _mix_bwd_table(
    w_ptr, v_ptr, dy_ptr, delta_ptr, dtable_ptr,  # [H,Tq,Tk] [B,Tk,H,P] [B,Tq,H,P] [H,Tq] -> [H,Tq,Tk]
    Tq, Tk, N, v_stride_b, v_stride_t, v_stride_h, dy_stride_b, dy_stride_t, dy_stride_h,
    P: tl.constexpr, CAUSAL: tl.constexpr, HAS_DELTA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M queries by BLOCK_N keys of one head, summed over the batch; hidden tiles become 0.

    Without delta, dw is written in place of dtable.
    """
    head = tl.program_id(1).to(tl.int64)
    tiles_n = tl.cdiv(Tk, BLOCK_N)
    q_tile, k_tile = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    i = q_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    j = k_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_q, in_k = i < Tq, j < Tk
    sees = in_q[:, None] & in_k[None, :]
    terms = N
    if CAUSAL:
        sees = sees & (j[None, :] <= i[:, None] + (Tk - Tq))
        terms = tl.where(k_tile * BLOCK_N < (q_tile + 1) * BLOCK_M + Tk - Tq, N, 0)
    dy_at = dy_ptr + head * dy_stride_h + i.to(tl.int64) * dy_stride_t
    v_at = v_ptr + head * v_stride_h + j.to(tl.int64) * v_stride_t
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lost = dw
    for start in range(0, terms, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        b, p = (column // P).to(tl.int64), column % P
        in_n = column < N
        dy = tl.load(
            dy_at[:, None] + (b * dy_stride_b + p)[None, :], mask=in_q[:, None] & in_n[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        v = tl.load(
            v_at[None, :] + (b * v_stride_b + p)[:, None], mask=in_n[:, None] & in_k[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_N]
        dw, lost = add_product(dw, lost, dy, v)
    at = head * Tq * Tk + i.to(tl.int64)[:, None] * Tk + j[None, :]
    if HAS_DELTA:
        delta = tl.load(delta_ptr + head * Tq + i, mask=in_q, other=0.0)
        w = tl.load(w_ptr + at, mask=sees, other=0.0).to(tl.float32)
        dw = w * (dw - delta[:, None])
    tl.store(dtable_ptr + at, tl.where(sees, dw, 0.0), mask=in_q[:, None] & in_k[None, :])


@triton.jit
def _centre_rows(
    w_ptr, dtable_ptr,  # [H,Tq,Tk], and dw [H,Tq,Tk] -> dtable
    Tq, Tk, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns one row of one head: dw becomes w (dw - sum_j w dw), where the row sees."""
    i, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = (head * Tq + i) * Tk
    stop = Tk
    if CAUSAL:
        stop = tl.minimum(Tk, i + 1 + Tk - Tq).to(tl.int32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, stop, BLOCK):
        j = start + tl.arange(0, BLOCK)
        dw = tl.load(dtable_ptr + at + j, mask=j < stop, other=0.0)
        sums += tl.load(w_ptr + at + j, mask=j < stop, other=0.0).to(tl.float32) * dw
    delta = tl.sum(sums, axis=0)
    for start in range(0, stop, BLOCK):
        j = start + tl.arange(0, BLOCK)
        dw = tl.load(dtable_ptr + at + j, mask=j < stop, other=0.0)
        w = tl.load(w_ptr + at + j, mask=j < stop, other=0.0).to(tl.float32)
        tl.store(dtable_ptr + at + j, w * (dw - delta), mask=j < stop)


def mix(weights: Tensor, v: Tensor, causal: bool) -> Tensor:
    """y [B,Tq,H,P] in the dtype of v. weights: [H,Tq,Tk], contiguous, of that dtype."""
    wanted, v = v.shape[3], wide_rows(v)
    batch, keys, heads, width = v.shape
    queries, columns = weights.shape[1], batch * width
    y = torch.empty((batch, queries, heads, width), dtype=v.dtype, device=v.device)
    tiles = tiles_for(queries, columns, v.element_size())
    grid = (cdiv(queries, tiles.rows) * cdiv(columns, tiles.columns), heads)
    _mix[grid](
        weights, v, y, queries, keys, columns, *v.stride()[:3], *y.stride()[:3],
        P=width, CAUSAL=causal, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.terms,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return cut_width(y, wanted)


def mix_backward_values(weights: Tensor, dy: Tensor, causal: bool) -> Tensor:
    """Gradient of v, [B,Tk,H,P]; arguments as in `mix`."""
    wanted, dy = dy.shape[3], wide_rows(dy)
    batch, queries, heads, width = dy.shape
    keys, columns = weights.shape[2], batch * width
    dv = torch.empty((batch, keys, heads, width), dtype=dy.dtype, device=dy.device)
    tiles = tiles_for(keys, columns, dy.element_size())
    grid = (cdiv(keys, tiles.rows) * cdiv(columns, tiles.columns), heads)
    _mix_bwd_values[grid](
        weights, dy, dv, queries, keys, columns, *dy.stride()[:3], *dv.stride()[:3],
        P=width, CAUSAL=causal, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.terms,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return cut_width(dv, wanted)


def mix_backward_table(weights: Tensor, v: Tensor, y: Tensor, dy: Tensor, causal: bool) -> Tensor:
    """Gradient of the logits, float32 [H,Tq,Tk], gathered over the batch; y: result of `mix`."""
    exact = v.dtype == torch.float32
    delta = weights if exact else (dy.float() * y.float()).sum((0, 3)).t().contiguous()  # [H,Tq]
    v, dy = wide_rows(v), wide_rows(dy)
    heads, queries, keys = weights.shape
    width = v.shape[3]
    dtable = torch.empty((heads, queries, keys), dtype=torch.float32, device=v.device)
    tiles = tiles_for(queries, keys, v.element_size())
    grid = (cdiv(queries, tiles.rows) * cdiv(keys, tiles.columns), heads)
    _mix_bwd_table[grid](
        weights, v, dy, delta, dtable, queries, keys, v.shape[0] * width, *v.stride()[:3], *dy.stride()[:3],
        P=width, CAUSAL=causal, HAS_DELTA=not exact,
        BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.terms,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if exact:
        block = row_block(keys)
        _centre_rows[(queries, heads)](
            weights, dtable, queries, keys, CAUSAL=causal, BLOCK=block, num_warps=block // 256 or 1
        )
    return dtable

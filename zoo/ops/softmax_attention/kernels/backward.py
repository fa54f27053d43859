"""Backward of softmax attention: weights come again from the log-sum-exp; keys and queries have a loop of their own.

With w = softmax weights, dw = dy v^T and delta = sum_j w dw = sum(dy * y): ds = w (dw - delta), dq = scale ds k,
dk = scale ds^T q, dv = w^T dy. The loop over queries builds w^T and ds^T directly, so that no accumulator is
transposed. No atomics. In float32 delta comes from a kernel of its own, see `row_stats`; in half precision the kernel
of dq writes it, and the kernel of dk and dv reads it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.primitives import add_product, dot
from zoo.ops.kernels.widths import cut_width
from zoo.ops.softmax_attention.kernels.row_stats import attention_row_stats
from zoo.ops.softmax_attention.kernels.tiles import strides, tiles_of, wide_rows, widths
from zoo.ops.softmax_attention.kernels.weights import logit_scale, powers, shared_out


@triton.jit
def _attention_bwd_dq(
    q_ptr, k_ptr, v_ptr, dy_ptr, y_ptr, lse_ptr, delta_ptr, share_ptr, dq_ptr,  # delta, share like lse; dq like q
    spans_ptr, tiles_ptr,  # [S,5] [2,M]
    S, M, scale, logit_scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, dy_stride_b, dy_stride_t, dy_stride_h, y_stride_b, y_stride_t, y_stride_h,
    dq_stride_b, dq_stride_t, dq_stride_h, lse_stride_b, lse_stride_h,
    HEADS_PER_GROUP: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
):  # fmt: skip
    """One program owns the gradient of BLOCK_Q queries of one head of one sequence; see above for their delta."""
    head = tl.program_id(1).to(tl.int64)
    group = head // HEADS_PER_GROUP
    s = tl.load(tiles_ptr + tl.program_id(0))
    tile = tl.load(tiles_ptr + M + tl.program_id(0))
    in_use = s < S
    q_first = tl.load(spans_ptr + s * 5, mask=in_use, other=0)
    q_length = tl.load(spans_ptr + s * 5 + 1, mask=in_use, other=0)
    k_first = tl.load(spans_ptr + s * 5 + 2, mask=in_use, other=0)
    k_length = tl.load(spans_ptr + s * 5 + 3, mask=in_use, other=0)
    offset = tl.load(spans_ptr + s * 5 + 4, mask=in_use, other=0)

    p, pv = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_PV)
    in_p, in_pv = p < P, pv < PV
    i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_q = i < q_length
    row = q_first + i
    q_at = q_ptr + s * q_stride_b + head * q_stride_h
    dy_at = dy_ptr + s * dy_stride_b + head * dy_stride_h
    stat_at = s * lse_stride_b + head * lse_stride_h
    q = tl.load(q_at + row[:, None] * q_stride_t + p[None, :], mask=in_q[:, None] & in_p[None, :], other=0.0)
    dy = tl.load(dy_at + row[:, None] * dy_stride_t + pv[None, :], mask=in_q[:, None] & in_pv[None, :], other=0.0)
    lse = tl.load(lse_ptr + stat_at + row, mask=in_q, other=float("inf"))
    if q_ptr.dtype.element_ty == tl.float32:
        delta = tl.load(delta_ptr + stat_at + row, mask=in_q, other=0.0)
    else:
        y_at = y_ptr + s * y_stride_b + head * y_stride_h
        y = tl.load(y_at + row[:, None] * y_stride_t + pv[None, :], mask=in_q[:, None] & in_pv[None, :], other=0.0)
        delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1)
        tl.store(delta_ptr + stat_at + row, delta, mask=in_q)
    dq = tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)
    k_stop = k_length
    if CAUSAL:
        k_stop = tl.minimum(k_stop, (tile + 1) * BLOCK_Q + offset)
    k_at = k_ptr + s * k_stride_b + group * k_stride_h
    v_at = v_ptr + s * v_stride_b + group * v_stride_h
    for start in range(0, k_stop, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        in_k = j < k_length
        col = k_first + j
        k = tl.load(k_at + col[:, None] * k_stride_t + p[None, :], mask=in_k[:, None] & in_p[None, :], other=0.0)
        v = tl.load(v_at + col[None, :] * v_stride_t + pv[:, None], mask=in_k[None, :] & in_pv[:, None], other=0.0)
        sees = in_q[:, None] & in_k[None, :]
        if CAUSAL:
            sees = sees & (j[None, :] <= i[:, None] + offset)
        logits = tl.where(sees, dot(q, tl.trans(k)) * logit_scale, float("-inf"))
        weights = powers(logits - lse[:, None], q_ptr)  # [BLOCK_Q, BLOCK_K]
        weights = shared_out(weights, share_ptr, stat_at + row, in_q, 0)
        ds = weights * (dot(dy, v) - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq)
    dq_at = dq_ptr + s * dq_stride_b + head * dq_stride_h + row[:, None] * dq_stride_t + p[None, :]
    tl.store(dq_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=in_q[:, None] & in_p[None, :])


@triton.jit
def _attention_bwd_dkdv(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, delta_ptr, share_ptr, dk_ptr, dv_ptr,  # dk like k, dv like v
    spans_ptr, tiles_ptr,  # [S,5] [2,M]
    S, M, scale, logit_scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, dy_stride_b, dy_stride_t, dy_stride_h,
    dk_stride_b, dk_stride_t, dk_stride_h, dv_stride_b, dv_stride_t, dv_stride_h, lse_stride_b, lse_stride_h,
    HEADS_PER_GROUP: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
):  # fmt: skip
    """One program owns the gradients of BLOCK_K keys and values of one group, summed over its query heads."""
    group = tl.program_id(1).to(tl.int64)
    s = tl.load(tiles_ptr + tl.program_id(0))
    tile = tl.load(tiles_ptr + M + tl.program_id(0))
    in_use = s < S
    q_first = tl.load(spans_ptr + s * 5, mask=in_use, other=0)
    q_length = tl.load(spans_ptr + s * 5 + 1, mask=in_use, other=0)
    k_first = tl.load(spans_ptr + s * 5 + 2, mask=in_use, other=0)
    k_length = tl.load(spans_ptr + s * 5 + 3, mask=in_use, other=0)
    offset = tl.load(spans_ptr + s * 5 + 4, mask=in_use, other=0)

    p, pv = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_PV)
    in_p, in_pv = p < P, pv < PV
    j = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = j < k_length
    col = k_first + j
    k_at = k_ptr + s * k_stride_b + group * k_stride_h
    v_at = v_ptr + s * v_stride_b + group * v_stride_h
    k = tl.load(k_at + col[:, None] * k_stride_t + p[None, :], mask=in_k[:, None] & in_p[None, :], other=0.0)
    v = tl.load(v_at + col[:, None] * v_stride_t + pv[None, :], mask=in_k[:, None] & in_pv[None, :], other=0.0)
    dk = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_PV], tl.float32)
    dk_lost, dv_lost = dk, dv
    q_start = tile * 0
    if CAUSAL:  # the first query that sees the first key of this tile, rounded down to a tile
        q_start = tl.maximum(tile * BLOCK_K - offset, 0) // BLOCK_Q * BLOCK_Q
    for r in range(0, HEADS_PER_GROUP):
        head = group * HEADS_PER_GROUP + r
        q_at = q_ptr + s * q_stride_b + head * q_stride_h
        dy_at = dy_ptr + s * dy_stride_b + head * dy_stride_h
        stat_at = s * lse_stride_b + head * lse_stride_h
        for start in range(q_start, q_length, BLOCK_Q):
            i = start + tl.arange(0, BLOCK_Q)
            in_q = i < q_length
            row = q_first + i
            q = tl.load(q_at + row[:, None] * q_stride_t + p[None, :], mask=in_q[:, None] & in_p[None, :], other=0.0)
            dy = tl.load(
                dy_at + row[:, None] * dy_stride_t + pv[None, :], mask=in_q[:, None] & in_pv[None, :], other=0.0
            )
            lse = tl.load(lse_ptr + stat_at + row, mask=in_q, other=float("inf"))
            delta = tl.load(delta_ptr + stat_at + row, mask=in_q, other=0.0)
            sees = in_k[:, None] & in_q[None, :]
            if CAUSAL:
                sees = sees & (j[:, None] <= i[None, :] + offset)
            logits = tl.where(sees, dot(k, tl.trans(q)) * logit_scale, float("-inf"))
            weights = powers(logits - lse[None, :], q_ptr)  # [BLOCK_K, BLOCK_Q]
            weights = shared_out(weights, share_ptr, stat_at + row, in_q, 1)
            dv, dv_lost = add_product(dv, dv_lost, weights.to(dy.dtype), dy)
            ds = weights * (dot(v, tl.trans(dy)) - delta[None, :])
            dk, dk_lost = add_product(dk, dk_lost, ds.to(q.dtype), q)
    dk_at = dk_ptr + s * dk_stride_b + group * dk_stride_h + col[:, None] * dk_stride_t + p[None, :]
    dv_at = dv_ptr + s * dv_stride_b + group * dv_stride_h + col[:, None] * dv_stride_t + pv[None, :]
    tl.store(dk_at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=in_k[:, None] & in_p[None, :])
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=in_k[:, None] & in_pv[None, :])


def attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    spans: Tensor,
    scale: float,
    causal: bool,
    packed: bool,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; see `triton_path` for the arguments."""
    wanted = (q.shape[3], k.shape[3], v.shape[3])
    dy, y, q, k, v = (wide_rows(tensor) for tensor in (dy, y, q, k, v))
    lse = lse.contiguous()
    batch, queries, heads, channels = q.shape
    keys, groups, value_channels = v.shape[1:]
    fresh = torch.zeros if padded else torch.empty
    dq = fresh(q.shape, dtype=q.dtype, device=q.device)
    dk = fresh(k.shape, dtype=k.dtype, device=k.device)
    dv = fresh(v.shape, dtype=v.dtype, device=v.device)
    delta = fresh(lse.shape, dtype=torch.float32, device=q.device)  # [B,H,Tq]
    block_p, block_pv = widths(channels), widths(value_channels)
    block, warps = _blocks(max(block_p, block_pv), q.element_size())
    sequences = spans.shape[0]
    input_strides = (*strides(q, packed), *strides(k, packed), *strides(v, packed), *strides(dy, packed))
    stat_strides = (0 if packed else lse.stride(0), lse.stride(1))
    sizes = {
        "HEADS_PER_GROUP": heads // groups, "P": channels, "PV": value_channels, "CAUSAL": causal,
        "BLOCK_Q": block, "BLOCK_K": block, "BLOCK_P": block_p, "BLOCK_PV": block_pv,
        "num_warps": warps, "num_stages": 2,
    }  # fmt: skip
    to_logits = logit_scale(scale, q.dtype)
    q_tiles, q_programs = tiles_of(spans[:, 1], batch * queries, block)
    share = dy
    if q.dtype == torch.float32:
        share = fresh(lse.shape, dtype=torch.float32, device=q.device)
        attention_row_stats[(q_programs, heads)](
            q, k, v, dy, lse, delta, share, spans, q_tiles, sequences, q_programs, to_logits,
            *input_strides, *stat_strides, **sizes,
        )  # fmt: skip
    _attention_bwd_dq[(q_programs, heads)](
        q, k, v, dy, y, lse, delta, share, dq, spans, q_tiles, sequences, q_programs, scale, to_logits,
        *input_strides, *strides(y, packed), *strides(dq, packed), *stat_strides, **sizes,
    )  # fmt: skip
    k_tiles, k_programs = tiles_of(spans[:, 3], batch * keys, block)
    _attention_bwd_dkdv[(k_programs, groups)](
        q, k, v, dy, lse, delta, share, dk, dv, spans, k_tiles, sequences, k_programs, scale, to_logits,
        *input_strides, *strides(dk, packed), *strides(dv, packed), *stat_strides, **sizes,
    )  # fmt: skip
    dq, dk, dv = (cut_width(gradient, width) for gradient, width in zip((dq, dk, dv), wanted, strict=True))
    return dq, dk, dv


def _blocks(width: int, element_size: int) -> tuple[int, int]:
    """(tile edge, warps) for tiles `width` channels wide."""
    if element_size == 4:
        return (32, 4) if width <= 128 else (16, 4)
    if width <= 64:
        return 64, 4
    return (64, 8) if width <= 128 else (32, 8)

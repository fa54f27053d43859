"""Forward of softmax attention: one pass over the keys with a running maximum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.primitives import dot
from zoo.ops.kernels.widths import cut_width
from zoo.ops.softmax_attention.kernels.tiles import strides, tiles_of, wide_rows, widths
from zoo.ops.softmax_attention.kernels.weights import log_of, logit_scale, powers


@triton.jit
def _attention_fwd(
    q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr,  # [B,Tq,H,P] [B,Tk,G,P] [B,Tk,G,Pv] -> [B,Tq,H,Pv] [B,H,Tq]
    spans_ptr, tiles_ptr,  # [S,5] [2,M]
    S, M, logit_scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, y_stride_b, y_stride_t, y_stride_h, lse_stride_b, lse_stride_h,
    HEADS_PER_GROUP: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_Q queries of one head of one sequence."""
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
    i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_q = i < q_length
    row = q_first + i
    q_at = q_ptr + s * q_stride_b + head * q_stride_h
    q = tl.load(q_at + row[:, None] * q_stride_t + p[None, :], mask=in_q[:, None] & (p < P)[None, :], other=0.0)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)  # running maximum
    total = tl.zeros([BLOCK_Q], tl.float32)
    y = tl.zeros([BLOCK_Q, BLOCK_PV], tl.float32)
    k_stop = k_length
    if CAUSAL:
        k_stop = tl.minimum(k_stop, (tile + 1) * BLOCK_Q + offset)
    k_at = k_ptr + s * k_stride_b + group * k_stride_h
    v_at = v_ptr + s * v_stride_b + group * v_stride_h
    for start in range(0, k_stop, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        in_k = j < k_length
        col = k_first + j
        k = tl.load(k_at + col[None, :] * k_stride_t + p[:, None], mask=in_k[None, :] & (p < P)[:, None], other=0.0)
        logits = dot(q, k) * logit_scale  # [BLOCK_Q, BLOCK_K]
        sees = in_q[:, None] & in_k[None, :]
        if CAUSAL:
            sees = sees & (j[None, :] <= i[:, None] + offset)
        logits = tl.where(sees, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        level = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = powers(logits - level[:, None], q_ptr)
        shrink = powers(top - level, q_ptr)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(v_at + col[:, None] * v_stride_t + pv[None, :], mask=in_k[:, None] & (pv < PV)[None, :], other=0.0)
        y = dot(weights.to(v.dtype), v, y * shrink[:, None])
        top = new_top
    alive = total > 0.0
    total = tl.where(alive, total, 1.0)
    y = y / total[:, None]
    lse = tl.where(alive, top + log_of(total, q_ptr), float("inf"))
    y_at = y_ptr + s * y_stride_b + head * y_stride_h + row[:, None] * y_stride_t + pv[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=in_q[:, None] & (pv < PV)[None, :])
    tl.store(lse_ptr + s * lse_stride_b + head * lse_stride_h + row, lse, mask=in_q)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scale: float, causal: bool, packed: bool, padded: bool
) -> tuple[Tensor, Tensor]:
    """y [B,Tq,H,Pv] and the log-sum-exp float32 [B,H,Tq]; see `triton_path` for the arguments."""
    wanted = v.shape[3]
    q, k, v = wide_rows(q), wide_rows(k), wide_rows(v)
    batch, queries, heads, channels = q.shape
    groups, value_channels = v.shape[2:]
    fresh = torch.zeros if padded else torch.empty
    y = fresh((batch, queries, heads, value_channels), dtype=q.dtype, device=q.device)
    lse = fresh((batch, heads, queries), dtype=torch.float32, device=q.device)
    block_p, block_pv = widths(channels), widths(value_channels)
    block_q, block_k, warps = _blocks(max(block_p, block_pv), q.element_size())
    tiles, programs = tiles_of(spans[:, 1], batch * queries, block_q)
    _attention_fwd[(programs, heads)](
        q, k, v, y, lse,
        spans, tiles,
        spans.shape[0], programs, logit_scale(scale, q.dtype),
        *strides(q, packed), *strides(k, packed), *strides(v, packed), *strides(y, packed),
        0 if packed else lse.stride(0), lse.stride(1),
        HEADS_PER_GROUP=heads // groups, P=channels, PV=value_channels, CAUSAL=causal,
        BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_P=block_p, BLOCK_PV=block_pv,
        num_warps=warps, num_stages=2,
    )  # fmt: skip
    return cut_width(y, wanted), lse


def _blocks(width: int, element_size: int) -> tuple[int, int, int]:
    """(BLOCK_Q, BLOCK_K, warps) for tiles `width` channels wide."""
    if element_size == 4:
        return (64, 32, 4) if width <= 64 else (32, 32, 4)
    if width <= 128:
        return 128, 64, 8 if width == 128 else 4
    return 64, 64, 8

"""What the float32 backward of softmax attention knows of each query: delta, and the share of its weights.

delta = sum_j w_j dw_j is a sum over outputs too, sum(dy * y), and half precision takes it from there. In float32 it is
the mean of dw under the weights that the tiles of ds have: where one key has nearly all the weight, dw - delta is what
is left of two numbers that must have the same errors. The sum that makes it a mean also normalises the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.primitives import dot
from zoo.ops.softmax_attention.kernels.weights import powers


@triton.jit
def attention_row_stats(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, delta_ptr, share_ptr,  # as in the forward; -> [B,H,Tq] each
    spans_ptr, tiles_ptr,  # [S,5] [2,M]
    S, M, logit_scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, dy_stride_b, dy_stride_t, dy_stride_h, lse_stride_b, lse_stride_h,
    HEADS_PER_GROUP: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
):  # fmt: skip
    """One program owns delta and share of BLOCK_Q queries of one head of one sequence."""
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
    stat_at = s * lse_stride_b + head * lse_stride_h + row
    q = tl.load(q_at + row[:, None] * q_stride_t + p[None, :], mask=in_q[:, None] & in_p[None, :], other=0.0)
    dy = tl.load(dy_at + row[:, None] * dy_stride_t + pv[None, :], mask=in_q[:, None] & in_pv[None, :], other=0.0)
    lse = tl.load(lse_ptr + stat_at, mask=in_q, other=float("inf"))
    sums = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)  # of each lane, so that few terms follow on each other
    products = sums
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
        sums += weights
        products += weights * dot(dy, v)
    total = tl.sum(sums, axis=1)
    share = tl.div_rn(1.0, tl.where(total > 0.0, total, 1.0))
    tl.store(delta_ptr + stat_at, tl.sum(products, axis=1) * share, mask=in_q)
    tl.store(share_ptr + stat_at, share, mask=in_q)

"""Gradients of causal readers, from states at the borders of chunks, in bfloat16: of q, or in reverse of k."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.favor_attention.kernels.border_read import settle
from zoo.ops.favor_attention.kernels.features import load_projection
from zoo.ops.favor_attention.kernels.walk import (
    LIMIT2,
    LOG2_LOG2E,
    columns_at,
    dash_rows,
    load_weights,
    multiply,
    origin,
    rows_at,
    store_rows,
)
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import LOG2E


@launched
def border_gradient_kernel(
    reader_ptr, writer_ptr, beside_ptr, payload_ptr,  # [BT,.,N] [BT,.,N] [BT,.,P] [BT,.,P]: q, k, dy, v or k, q, v, dy
    hi_ptr, lo_ptr, rows_ptr,  # [M,N] each: log2(e) N^-1/4 times the projection as a sum, and in bfloat16
    half_ptr,  # [BT,G] float32, log2(e) |k'|^2 / 2
    log_total_ptr, delta_ptr,  # [BT,H] float32: logarithms of the queries' sums of weights; <dy, y>
    sums_ptr, scales_ptr,  # what `border_sweep_kernel` has stored
    starts_ptr, ends_ptr, owner_ptr, local_ptr,  # int64 [S], [S], [slots], [slots]: sequence and chunk of every slot
    grad_ptr,  # [slices,BT,H,N]
    tokens, half_scale, feature_eps,
    reader_stride_t, reader_stride_h, writer_stride_t, writer_stride_h,
    beside_stride_t, beside_stride_h, payload_stride_t, payload_stride_h,
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, J_READER: tl.constexpr, J_WRITER: tl.constexpr,
    RELU: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M features of a chunk of one head; see `causal_gradient_kernel` for what it computes."""
    slot = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    sequence = tl.load(owner_ptr + slot)
    at = tl.load(local_ptr + slot) * CHUNK
    start = tl.load(starts_ptr + sequence)
    length = tl.load(ends_ptr + sequence) - start
    if at >= length:
        return
    step = tl.arange(0, CHUNK)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    in_m, in_n, in_p = m < M, n < N, p < P
    reader_ptr += head // J_READER * reader_stride_h
    beside_ptr += head // J_READER * beside_stride_h
    writer_ptr += head // J_WRITER * writer_stride_h
    payload_ptr += head // J_WRITER * payload_stride_h
    slice_at = tl.program_id(1).to(tl.int64) * tokens
    EVEN_M: tl.constexpr = M % BLOCK_M == 0
    EVEN_N: tl.constexpr = N == BLOCK_N
    EVEN_P: tl.constexpr = P == BLOCK_P
    J_KEY: tl.constexpr = J_READER if REVERSE else J_WRITER
    token, sign = origin(start, length, at, REVERSE)
    left = tl.minimum(length - at, CHUNK).to(tl.int32)
    in_seq = step < left
    row = token * H + head + step * (sign * H)  # [CHUNK], of [BT,H]
    key = token * (H // J_KEY) + head // J_KEY + step * (sign * (H // J_KEY))  # of [BT,G]
    border = slot * H + head
    scales_ptr += border * (2 * M)

    scale = tl.load(scales_ptr + M + m, mask=in_m, other=0.0)
    begun = left - left
    while begun < left:
        hi, lo = load_weights(hi_ptr, lo_ptr, m, n, in_m, in_n, N, SPLIT)
        delta = tl.load(delta_ptr + row, mask=in_seq, other=0.0)
        log_total = tl.load(log_total_ptr + row, mask=in_seq, other=0.0) * LOG2E
        one_each = tl.full([CHUNK], 1.0, tl.float32)
        if REVERSE:
            below, weight, mass = tl.where(in_seq, log_total, float("inf")), one_each, delta
            less = tl.load(half_ptr + key, mask=in_seq, other=0.0)
        else:
            below, weight, mass = tl.load(half_ptr + key, mask=in_seq, other=float("inf")), delta, one_each
            less = log_total
        written = rows_at(writer_ptr, token, sign, step, writer_stride_t, n, in_seq, in_n, EVEN_N)
        log = dash_rows(hi, lo, written, SPLIT)  # [CHUNK, BLOCK_M]
        count = left
        slow = left < 0
        if RELU:
            features = tl.where(in_m[None, :] & in_seq[:, None], tl.maximum(log, 0.0) + feature_eps, 0.0)
            if REVERSE:
                features *= tl.exp2(-below)[:, None]
        else:
            log = log - below[:, None]
            if not EVEN_M:
                log = tl.where(in_m[None, :], log, float("-inf"))
            excess = tl.max(log - scale[None, :], axis=1)
            slow = (tl.max(excess, axis=0) > LIMIT2) | (begun > 0)
            if slow:
                scale, count = settle(log, scale, begun, step, 0, CHUNK)
                count = tl.minimum(count, left)
                log = tl.where(step[:, None] < count, log, float("-inf"))
            features = tl.exp2(log - scale[None, :])
        features = features.to(tl.bfloat16)
        beside = rows_at(beside_ptr, token, sign, step, beside_stride_t, p, in_seq, in_p, EVEN_P)
        payload = columns_at(payload_ptr, token, sign, step, payload_stride_t, p, in_seq, in_p, EVEN_P)
        pairs = multiply(beside, payload) - weight[:, None] * mass[None, :]  # [CHUNK, CHUNK]
        pairs = tl.where(step[:, None] >= step[None, :], pairs, 0.0).to(tl.bfloat16)
        state_at = m[None, :] * P + p[:, None]
        if EVEN_M and EVEN_P:
            sums = tl.load(sums_ptr + border * (M * P) + state_at)  # [BLOCK_P, BLOCK_M]
        else:
            sums = tl.load(sums_ptr + border * (M * P) + state_at, mask=in_m[None, :] & in_p[:, None], other=0.0)
        total = tl.load(scales_ptr + m, mask=in_m, other=0.0)
        felt = multiply(beside, sums) - weight[:, None] * total[None, :]  # [CHUNK, BLOCK_M]
        if slow:
            entered = tl.load(scales_ptr + M + m, mask=in_m, other=0.0)
            felt *= tl.exp2(entered - scale)[None, :]
        felt = multiply(pairs, features, felt)
        read = rows_at(reader_ptr, token, sign, step, reader_stride_t, n, in_seq, in_n, EVEN_N)
        dash = dash_rows(hi, lo, read, SPLIT)  # [CHUNK, BLOCK_M]
        if RELU:
            slope = tl.where(dash > 0, 1.0, 0.0)
            if not REVERSE:
                slope *= tl.exp2(-less)[:, None]
        else:
            slope = dash - (less + LOG2_LOG2E)[:, None] + scale[None, :]
            if not EVEN_M:
                slope = tl.where(in_m[None, :], slope, float("-inf"))
            slope = tl.exp2(slope)
        felt *= slope
        rows = load_projection(rows_ptr, m, n, in_m, in_n, N)
        grad = multiply(felt, rows)  # [CHUNK, BLOCK_N]
        if REVERSE and not RELU:
            grad -= read.to(tl.float32) * (tl.sum(felt, axis=1) * (2.0 * half_scale))[:, None]
        admitted = (step >= begun) & (step < count)
        store_rows(grad_ptr + (slice_at * H + head) * N, grad, token, sign, step, n, admitted, in_n, H * N, EVEN_N)
        begun = tl.maximum(count, begun + 1)  # whatever is not a number

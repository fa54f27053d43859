"""Gradients of causal readers in bfloat16: those of q in the forward direction, those of k in reverse."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.favor_attention.kernels.features import leave, load_projection
from zoo.ops.favor_attention.kernels.walk import (
    LIMIT2,
    LOG2_LOG2E,
    admit,
    columns_at,
    dash_rows,
    enter_walk,
    first_writer,
    load_weights,
    multiply,
    natural,
    origin,
    rows_at,
    store_rows,
)
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import LOG2E


@launched(do_not_specialize=["tokens"])
def walk_gradient_kernel(
    reader_ptr, writer_ptr, beside_ptr, payload_ptr,  # [BT,.,N] [BT,.,N] [BT,.,P] [BT,.,P]: q, k, dy, v or k, q, v, dy
    hi_ptr, lo_ptr, rows_ptr,  # [M,N] each: log2(e) N^-1/4 times the projection as a sum, and in bfloat16
    half_ptr,  # [BT,G] float32, log2(e) |k'|^2 / 2
    log_total_ptr, delta_ptr,  # [BT,H] float32: logarithms of the queries' sums of weights; <dy, y>
    first_ptr, last_ptr,  # [S,H,M,P+2] float32, contiguous
    starts_ptr, ends_ptr,  # int64 [S], spans of tokens
    grad_ptr,  # [slices,BT,H,N]
    tokens, half_scale, feature_eps,
    reader_stride_t, reader_stride_h, writer_stride_t, writer_stride_h,
    beside_stride_t, beside_stride_h, payload_stride_t, payload_stride_h,
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, J_READER: tl.constexpr, J_WRITER: tl.constexpr,
    RELU: tl.constexpr, REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, SPLIT: tl.constexpr,
    CHUNK: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M features of one (sequence, head); see `causal_gradient_kernel` for what it computes."""
    sequence = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    start = tl.load(starts_ptr + sequence)
    length = tl.load(ends_ptr + sequence) - start
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
    state_at = (sequence * H + head) * M * (P + 2)
    hi, lo = load_weights(hi_ptr, lo_ptr, m, n, in_m, in_n, N, SPLIT)
    rows = hi
    if hi.dtype != tl.bfloat16:
        rows = load_projection(rows_ptr, m, n, in_m, in_n, N)

    sums, total, scale = enter_walk(first_ptr, state_at, m, p, in_m, in_p, P, HAS_FIRST, True, RELU, BLOCK_M, BLOCK_P)
    passed = length - length
    while passed < length:
        if not RELU:
            one = first_writer(
                writer_ptr, half_ptr, log_total_ptr, hi, lo, start, length, passed, head, n, in_m, in_n,
                writer_stride_t, H, J_KEY, REVERSE, SPLIT,
            )  # fmt: skip
            grown = tl.maximum(scale, one)
            kept = tl.exp2(scale - grown)
            sums *= kept[None, :]
            total *= kept
            scale = grown
        begun = passed
        is_open = tl.full([], 1, tl.int32)
        chunks = tl.minimum((length - begun + CHUNK - 1) // CHUNK, RUN).to(tl.int32)
        for chunk in range(0, chunks):
            at = begun + chunk * CHUNK
            token, sign = origin(start, length, at, REVERSE)
            left = tl.minimum(length - at, CHUNK).to(tl.int32)
            in_seq = step < left
            row = token * H + head + step * (sign * H)  # [CHUNK], of [BT,H]
            key = token * (H // J_KEY) + head // J_KEY + step * (sign * (H // J_KEY))  # of [BT,G]
            # rows [CHUNK, width], columns [width, CHUNK]
            written = rows_at(writer_ptr, token, sign, step, writer_stride_t, n, in_seq, in_n, EVEN_N)
            read = rows_at(reader_ptr, token, sign, step, reader_stride_t, n, in_seq, in_n, EVEN_N)
            beside = rows_at(beside_ptr, token, sign, step, beside_stride_t, p, in_seq, in_p, EVEN_P)
            payload = columns_at(payload_ptr, token, sign, step, payload_stride_t, p, in_seq, in_p, EVEN_P)
            delta = tl.load(delta_ptr + row, mask=in_seq, other=0.0)
            log_total = tl.load(log_total_ptr + row, mask=in_seq, other=0.0) * LOG2E
            dash = dash_rows(hi, lo, read, SPLIT)  # [CHUNK, BLOCK_M]
            if REVERSE:
                less = tl.load(half_ptr + key, mask=in_seq, other=0.0)
            else:
                less = log_total
            if RELU:
                slope = tl.where(dash > 0, 1.0, 0.0)
                if not REVERSE:
                    slope *= tl.exp2(-less)[:, None]
            else:
                slope = dash - (less + LOG2_LOG2E)[:, None] + scale[None, :]
                if not EVEN_M:
                    slope = tl.where(in_m[None, :], slope, float("-inf"))
                slope = tl.exp2(slope)
            slope = slope.to(tl.bfloat16)  # leaves room for the products that it is multiplied with
            log = dash_rows(hi, lo, written, SPLIT)  # [CHUNK, BLOCK_M]
            one_each = tl.full([CHUNK], 1.0, tl.float32)
            if REVERSE:
                below, weight, mass = tl.where(in_seq, log_total, float("inf")), one_each, delta
            else:
                below, weight, mass = tl.load(half_ptr + key, mask=in_seq, other=float("inf")), delta, one_each
            if RELU:
                count = left
                features = tl.where(in_m[None, :] & in_seq[:, None], tl.maximum(log, 0.0) + feature_eps, 0.0)
                if REVERSE:
                    features *= tl.exp2(-below)[:, None]
            else:
                log = log - below[:, None] - scale[None, :]
                if not EVEN_M:
                    log = tl.where(in_m[None, :], log, float("-inf"))
                excess = tl.max(log, axis=1)
                count = left
                if (tl.max(excess, axis=0) > LIMIT2) | (is_open == 0):
                    count, is_open = admit(excess, step, chunk, left, is_open, CHUNK)
                    log = tl.where(step[:, None] < count, log, float("-inf"))
                features = tl.exp2(log)
            total_before = total
            total += tl.sum(features * mass[:, None], axis=0)
            features = features.to(tl.bfloat16)
            pairs = multiply(beside, payload) - weight[:, None] * mass[None, :]  # [CHUNK, CHUNK]
            pairs = tl.where(step[:, None] >= step[None, :], pairs, 0.0)
            felt = multiply(beside, sums)
            felt = multiply(pairs, features, felt) - weight[:, None] * total_before[None, :]  # [CHUNK, BLOCK_M]
            felt *= slope.to(tl.float32)
            grad = multiply(felt, rows)  # [CHUNK, BLOCK_N]
            if REVERSE and not RELU:
                grad -= read.to(tl.float32) * (tl.sum(felt, axis=1) * (2.0 * half_scale))[:, None]
            admitted = step < count
            store_rows(grad_ptr + (slice_at * H + head) * N, grad, token, sign, step, n, admitted, in_n, H * N, EVEN_N)
            sums = multiply(payload, features, sums)
            passed += count
    if REVERSE:
        leave(last_ptr + state_at, sums, total, natural(scale, RELU), m, p, in_m, in_p, P, True)

"""What causal readers read, in bfloat16: outputs in the forward, gradients of v in reverse."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.favor_attention.kernels.features import leave
from zoo.ops.favor_attention.kernels.walk import (
    LIMIT2,
    admit,
    below_of,
    columns_at,
    dash_columns,
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
from zoo.ops.kernels.primitives import LN2


@launched(do_not_specialize=["tokens"])
def walk_read_kernel(
    reader_ptr, writer_ptr, payload_ptr,  # [BT,.,N] [BT,.,N] [BT,.,P]: q, k, v, or k, q, dy in reverse
    hi_ptr, lo_ptr,  # [M,N] each, log2(e) N^-1/4 times the projection (without log2(e) for ReLU features)
    half_ptr,  # [BT,G] float32, log2(e) |k'|^2 / 2
    log_total_ptr,  # [BT,H] float32, logarithms of the queries' sums of weights; in reverse only
    first_ptr, last_ptr,  # [S,H,M,P+2] float32, contiguous
    starts_ptr, ends_ptr,  # int64 [S], spans of tokens
    out_ptr, out_log_ptr,  # [slices,BT,H,P], [slices,BT,H] float32
    tokens, feature_eps,
    reader_stride_t, reader_stride_h, writer_stride_t, writer_stride_h, payload_stride_t, payload_stride_h,
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    J_READER: tl.constexpr, J_WRITER: tl.constexpr, J_PAYLOAD: tl.constexpr,  # query heads of one of theirs
    RELU: tl.constexpr, REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, EMPTY_LOG: tl.constexpr, SPLIT: tl.constexpr,
    CHUNK: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M features of one (sequence, head) and walks its tokens with their state."""
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
    writer_ptr += head // J_WRITER * writer_stride_h
    payload_ptr += head // J_PAYLOAD * payload_stride_h
    slice_at = tl.program_id(1).to(tl.int64) * tokens
    EVEN_M: tl.constexpr = M % BLOCK_M == 0
    EVEN_N: tl.constexpr = N == BLOCK_N
    EVEN_P: tl.constexpr = P == BLOCK_P
    J_KEY: tl.constexpr = J_READER if REVERSE else J_WRITER
    state_at = (sequence * H + head) * M * (P + 2)
    hi, lo = load_weights(hi_ptr, lo_ptr, m, n, in_m, in_n, N, SPLIT)

    sums, total, top = enter_walk(first_ptr, state_at, m, p, in_m, in_p, P, HAS_FIRST, False, RELU, BLOCK_M, BLOCK_P)
    scale = top
    passed = length - length
    while passed < length:
        if not RELU:
            one = first_writer(
                writer_ptr, half_ptr, log_total_ptr, hi, lo, start, length, passed, head, n, in_m, in_n,
                writer_stride_t, H, J_KEY, REVERSE, SPLIT,
            )  # fmt: skip
            grown = tl.maximum(top, one)
            kept = tl.exp2(scale - grown)
            sums *= kept[:, None]
            total *= kept
            scale = grown
            top = grown
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
            written = columns_at(writer_ptr, token, sign, step, writer_stride_t, n, in_seq, in_n, EVEN_N)
            read = rows_at(reader_ptr, token, sign, step, reader_stride_t, n, in_seq, in_n, EVEN_N)
            payload = rows_at(payload_ptr, token, sign, step, payload_stride_t, p, in_seq, in_p, EVEN_P)
            log = dash_columns(hi, lo, written, SPLIT)  # [BLOCK_M, CHUNK]
            below = below_of(half_ptr, log_total_ptr, key, row, in_seq, REVERSE)
            highest = tl.zeros([CHUNK], tl.float32)
            if RELU:
                count = left
                features = tl.where(in_m[:, None] & in_seq[None, :], tl.maximum(log, 0.0) + feature_eps, 0.0)
                if REVERSE:
                    features *= tl.exp2(-below)[None, :]
            else:
                log = log - below[None, :] - scale[:, None]
                if not EVEN_M:
                    log = tl.where(in_m[:, None], log, float("-inf"))
                peak = tl.max(log, axis=1)
                count = left
                if (tl.max(peak, axis=0) > LIMIT2) | (is_open == 0):  # the maximum of every writer is rarely wanted
                    count, is_open = admit(tl.max(log, axis=0), step, chunk, left, is_open, CHUNK)
                    log = tl.where(step[None, :] < count, log, float("-inf"))
                    peak = tl.max(log, axis=1)
                if not REVERSE:
                    top = tl.maximum(top, peak + scale)
                features = tl.exp2(log)
            before = total
            total += tl.sum(features, axis=1)
            features = features.to(tl.bfloat16)
            dash = dash_rows(hi, lo, read, SPLIT)  # [CHUNK, BLOCK_M]
            if RELU:
                queries = tl.where(in_m[None, :], tl.maximum(dash, 0.0) + feature_eps, 0.0)
            else:
                logits = dash + scale[None, :]
                if not EVEN_M:
                    logits = tl.where(in_m[None, :], logits, float("-inf"))
                if REVERSE:
                    highest = tl.load(half_ptr + key, mask=in_seq, other=0.0)
                else:
                    highest = tl.max(logits, axis=1)
                queries = tl.exp2(logits - highest[:, None])
            weight = tl.zeros([CHUNK], tl.float32)
            if not REVERSE:
                weight = tl.sum(queries * before[None, :], axis=1)
            queries = queries.to(tl.bfloat16)  # what is no longer needed in float32 leaves the registers early
            scores = multiply(queries, features)  # [CHUNK, CHUNK]
            scores = tl.where(step[:, None] >= step[None, :], scores, 0.0)
            if not REVERSE:
                weight += tl.sum(scores, axis=1)
            scores = scores.to(tl.bfloat16)
            out = multiply(queries, sums)
            out = multiply(scores, payload, out)  # [CHUNK, BLOCK_P]
            admitted = step < count
            if not REVERSE:
                seen = weight > 0
                weight = tl.where(seen, weight, 1.0)
                out *= (1.0 / weight)[:, None]
                log_total = tl.where(seen, (highest + tl.log2(weight)) * LN2, EMPTY_LOG)
                if RELU:
                    log_total = tl.where(seen, tl.log(weight), EMPTY_LOG)
                tl.store(out_log_ptr + slice_at * H + row, log_total, mask=admitted)
            store_rows(out_ptr + (slice_at * H + head) * P, out, token, sign, step, p, admitted, in_p, H * P, EVEN_P)
            sums = multiply(features, payload, sums)
            passed += count
    if not REVERSE:
        if not RELU:
            kept = tl.exp2(scale - top)
            sums *= kept[:, None]
            total *= kept
        leave(last_ptr + state_at, sums, total, natural(top, RELU), m, p, in_m, in_p, P, False)

"""What causal readers read, from states at the borders of chunks: outputs, or in reverse gradients of v."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.favor_attention.kernels.walk import (
    LIMIT2,
    below_of,
    columns_at,
    dash_columns,
    dash_rows,
    load_weights,
    multiply,
    origin,
    rows_at,
    store_rows,
)
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import LN2


@triton.jit
def border_of(sums_ptr, scales_ptr, border, m, p, in_m, in_p, M: tl.constexpr, P: tl.constexpr, EVEN: tl.constexpr):
    """Sums [BLOCK_M, BLOCK_P] before a chunk, sums of payload scalars and scales, [BLOCK_M] each."""
    at = m[:, None] * P + p[None, :]
    if EVEN:
        sums = tl.load(sums_ptr + border * (M * P) + at)
    else:
        sums = tl.load(sums_ptr + border * (M * P) + at, mask=in_m[:, None] & in_p[None, :], other=0.0)
    total = tl.load(scales_ptr + border * (2 * M) + m, mask=in_m, other=0.0)
    scale = tl.load(scales_ptr + border * (2 * M) + M + m, mask=in_m, other=0.0)
    return sums, total, scale


@triton.jit
def settle(log, scale, begun, step, AXIS: tl.constexpr, CHUNK: tl.constexpr):
    """The scale of the writers from `begun` on, where one of the chunk exceeds the present one by more than LIMIT2.

    log: their binary logarithms, tokens along AXIS. If the writer `begun` itself exceeds it, the scale becomes the
    maximum of those up to it. Returns the scale and how many writers come before the next that exceeds it.
    """
    along = tl.expand_dims(step, 1 - AXIS)
    excess = tl.max(log - tl.expand_dims(scale, AXIS), axis=1 - AXIS)  # [CHUNK]
    at_first = tl.max(tl.where(step == begun, excess, float("-inf")), axis=0)
    grown = tl.maximum(scale, tl.max(tl.where(along <= begun, log, float("-inf")), axis=AXIS))
    scale = tl.where(at_first > LIMIT2, grown, scale)
    excess = tl.max(log - tl.expand_dims(scale, AXIS), axis=1 - AXIS)
    return scale, tl.min(tl.where((excess > LIMIT2) & (step > begun), step, CHUNK), axis=0)


@launched
def border_read_kernel(
    reader_ptr, writer_ptr, payload_ptr,  # [BT,.,N] [BT,.,N] [BT,.,P]: q, k, v, or k, q, dy in reverse
    hi_ptr, lo_ptr,  # [M,N] each, log2(e) N^-1/4 times the projection (without log2(e) for ReLU features)
    half_ptr,  # [BT,G] float32, log2(e) |k'|^2 / 2
    log_total_ptr,  # [BT,H] float32, logarithms of the queries' sums of weights; in reverse only
    sums_ptr, scales_ptr,  # what `border_sweep_kernel` has stored
    starts_ptr, ends_ptr, owner_ptr, local_ptr,  # int64 [S], [S], [slots], [slots]: sequence and chunk of every slot
    out_ptr, out_log_ptr,  # [slices,BT,H,P], [slices,BT,H] float32
    tokens, feature_eps,
    reader_stride_t, reader_stride_h, writer_stride_t, writer_stride_h, payload_stride_t, payload_stride_h,
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    J_READER: tl.constexpr, J_WRITER: tl.constexpr, J_PAYLOAD: tl.constexpr,  # query heads of one of theirs
    RELU: tl.constexpr, REVERSE: tl.constexpr, EMPTY_LOG: tl.constexpr, SPLIT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M features of a chunk of one head.

    It goes once through its chunk, or once more for every writer that outgrows the scale (`settle`).
    """
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
    writer_ptr += head // J_WRITER * writer_stride_h
    payload_ptr += head // J_PAYLOAD * payload_stride_h
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

    scale = tl.load(scales_ptr + border * (2 * M) + M + m, mask=in_m, other=0.0)
    begun = left - left
    while begun < left:
        hi, lo = load_weights(hi_ptr, lo_ptr, m, n, in_m, in_n, N, SPLIT)
        written = columns_at(writer_ptr, token, sign, step, writer_stride_t, n, in_seq, in_n, EVEN_N)
        log = dash_columns(hi, lo, written, SPLIT)  # [BLOCK_M, CHUNK]
        below = below_of(half_ptr, log_total_ptr, key, row, in_seq, REVERSE)
        count = left
        slow = left < 0
        if RELU:
            features = tl.where(in_m[:, None] & in_seq[None, :], tl.maximum(log, 0.0) + feature_eps, 0.0)
            if REVERSE:
                features *= tl.exp2(-below)[None, :]
        else:
            log = log - below[None, :]
            if not EVEN_M:
                log = tl.where(in_m[:, None], log, float("-inf"))
            slow = (tl.max(tl.max(log, axis=1) - scale, axis=0) > LIMIT2) | (begun > 0)
            if slow:
                scale, count = settle(log, scale, begun, step, 1, CHUNK)
                count = tl.minimum(count, left)
                log = tl.where(step[None, :] < count, log, float("-inf"))
            features = tl.exp2(log - scale[:, None])
        features = features.to(tl.bfloat16)
        read = rows_at(reader_ptr, token, sign, step, reader_stride_t, n, in_seq, in_n, EVEN_N)
        dash = dash_rows(hi, lo, read, SPLIT)  # [CHUNK, BLOCK_M]
        sums, total, entered = border_of(sums_ptr, scales_ptr, border, m, p, in_m, in_p, M, P, EVEN_M and EVEN_P)
        highest = tl.zeros([CHUNK], tl.float32)
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
        inside = queries.to(tl.bfloat16)
        if slow:
            queries *= tl.exp2(entered - scale)[None, :]
        weight = tl.zeros([CHUNK], tl.float32)
        if not REVERSE:
            weight = tl.sum(queries * total[None, :], axis=1)
        queries = queries.to(tl.bfloat16)
        scores = multiply(inside, features)  # [CHUNK, CHUNK]
        scores = tl.where(step[:, None] >= step[None, :], scores, 0.0)
        if not REVERSE:
            weight += tl.sum(scores, axis=1)
        scores = scores.to(tl.bfloat16)
        payload = rows_at(payload_ptr, token, sign, step, payload_stride_t, p, in_seq, in_p, EVEN_P)
        out = multiply(queries, sums)
        out = multiply(scores, payload, out)  # [CHUNK, BLOCK_P]
        admitted = (step >= begun) & (step < count)
        if not REVERSE:
            seen = weight > 0
            weight = tl.where(seen, weight, 1.0)
            out *= (1.0 / weight)[:, None]
            log_total = tl.where(seen, (highest + tl.log2(weight)) * LN2, EMPTY_LOG)
            if RELU:
                log_total = tl.where(seen, tl.log(weight), EMPTY_LOG)
            tl.store(out_log_ptr + slice_at * H + row, log_total, mask=admitted)
        store_rows(out_ptr + (slice_at * H + head) * P, out, token, sign, step, p, admitted, in_p, H * P, EVEN_P)
        begun = tl.maximum(count, begun + 1)  # whatever is not a number

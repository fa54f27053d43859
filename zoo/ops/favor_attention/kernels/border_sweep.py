"""States of the writers' sums at the borders of chunks, for kernels that read them chunk by chunk, in bfloat16."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.favor_attention.kernels.features import leave
from zoo.ops.favor_attention.kernels.walk import (
    below_of,
    columns_at,
    dash_columns,
    enter_walk,
    load_weights,
    multiply,
    natural,
    origin,
    rows_at,
)
from zoo.ops.kernels.launcher import launched

GROWTH = tl.constexpr(20.0)  # most that a writer's binary logarithm exceeds the scale of the sums


@launched
def border_sweep_kernel(
    writer_ptr, payload_ptr,  # [BT,.,N] [BT,.,P]: k, v, or q, dy in reverse
    hi_ptr, lo_ptr,  # [M,N] each, log2(e) N^-1/4 times the projection (without log2(e) for ReLU features)
    half_ptr,  # [BT,G] float32, log2(e) |k'|^2 / 2
    log_total_ptr, delta_ptr,  # [BT,H] float32, in reverse only: logarithms of the queries' sums of weights; <dy, y>
    first_ptr, last_ptr,  # [S,H,M,P+2] float32, contiguous
    starts_ptr, ends_ptr, slots_ptr,  # int64 [S], spans of tokens and the slot of each sequence's first chunk
    sums_ptr, scales_ptr,  # [slots,H,M,P], [slots,H,2,M] float32: sums of payload; of payload scalars, and scales
    feature_eps, writer_stride_t, writer_stride_h, payload_stride_t, payload_stride_h,
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, J_WRITER: tl.constexpr,
    RELU: tl.constexpr, REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, SPLIT: tl.constexpr,
    CHUNK: tl.constexpr, PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M features of one (sequence, head): it adds up PART tokens at a time.

    Sums are stored as they are before every chunk of CHUNK tokens, below a scale that depends on those alone.
    """
    sequence = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    start = tl.load(starts_ptr + sequence)
    length = tl.load(ends_ptr + sequence) - start
    slot = tl.load(slots_ptr + sequence)
    step = tl.arange(0, PART)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    in_m, in_n, in_p = m < M, n < N, p < P
    writer_ptr += head // J_WRITER * writer_stride_h
    payload_ptr += head // J_WRITER * payload_stride_h
    EVEN_M: tl.constexpr = M % BLOCK_M == 0
    EVEN_N: tl.constexpr = N == BLOCK_N
    EVEN_P: tl.constexpr = P == BLOCK_P
    PARTS: tl.constexpr = CHUNK // PART
    state_at = (sequence * H + head) * M * (P + 2)
    hi, lo = load_weights(hi_ptr, lo_ptr, m, n, in_m, in_n, N, SPLIT)

    sums, total, top = enter_walk(first_ptr, state_at, m, p, in_m, in_p, P, HAS_FIRST, False, RELU, BLOCK_M, BLOCK_P)
    scale = top
    for part in range(0, ((length + PART - 1) // PART).to(tl.int32)):
        at = start - start + part * PART
        if part % PARTS == 0:
            border = (slot + part // PARTS) * H + head
            inside = m[:, None] * P + p[None, :]
            mask = in_m[:, None] & in_p[None, :]
            tl.store(sums_ptr + border * (M * P) + inside, sums.to(sums_ptr.dtype.element_ty), mask=mask)
            tl.store(scales_ptr + border * (2 * M) + m, total, mask=in_m)
            tl.store(scales_ptr + border * (2 * M) + M + m, scale, mask=in_m)
        token, sign = origin(start, length, at, REVERSE)
        left = tl.minimum(length - at, PART).to(tl.int32)
        in_seq = step < left
        row = token * H + head + step * (sign * H)  # [PART], of [BT,H]
        key = token * (H // J_WRITER) + head // J_WRITER + step * (sign * (H // J_WRITER))  # of [BT,G]
        written = columns_at(writer_ptr, token, sign, step, writer_stride_t, n, in_seq, in_n, EVEN_N)
        payload = rows_at(payload_ptr, token, sign, step, payload_stride_t, p, in_seq, in_p, EVEN_P)
        log = dash_columns(hi, lo, written, SPLIT)  # [BLOCK_M, PART]
        below = below_of(half_ptr, log_total_ptr, key, row, in_seq, REVERSE)
        if RELU:
            features = tl.where(in_m[:, None] & in_seq[None, :], tl.maximum(log, 0.0) + feature_eps, 0.0)
            if REVERSE:
                features *= tl.exp2(-below)[None, :]
        else:
            log = log - below[None, :]
            if not EVEN_M:
                log = tl.where(in_m[:, None], log, float("-inf"))
            peak = tl.max(log, axis=1)
            top = tl.maximum(top, peak)
            if tl.max(peak - scale, axis=0) > GROWTH:
                kept = tl.exp2(scale - top)
                sums *= kept[:, None]
                total *= kept
                scale = top
            features = tl.exp2(log - scale[:, None])
        if REVERSE:
            mass = tl.load(delta_ptr + row, mask=in_seq, other=0.0)
            total += tl.sum(features * mass[None, :], axis=1)
        else:
            total += tl.sum(features, axis=1)
        sums = multiply(features, payload, sums)
    if not RELU:
        kept = tl.exp2(scale - top)
        sums *= kept[:, None]
        total *= kept
    leave(last_ptr + state_at, sums, total, natural(top, RELU), m, p, in_m, in_p, P, False)

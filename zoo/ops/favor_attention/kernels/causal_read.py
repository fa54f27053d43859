"""What causal readers read: outputs in the forward, gradients of v in reverse."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.favor_attention.kernels.features import (
    add_written,
    enter,
    half_square,
    leave,
    load_columns,
    load_rows,
    place,
    project_tokens,
    write,
)
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import exp
from zoo.ops.semiseparable.kernels.decay import product


@launched(do_not_specialize=["tokens"])
def causal_read_kernel(
    reader_ptr, writer_ptr, payload_ptr,  # [BT,.,N] [BT,.,N] [BT,.,P]: q, k, v, or k, q, dy in reverse
    hi_ptr, lo_ptr,  # [M,N] each, N^-1/4 times the projection
    log_total_ptr,  # [BT,H] float32, logarithms of the queries' sums of weights; in reverse only
    first_ptr, last_ptr,  # [S,H,M,P+2] float32, contiguous
    starts_ptr, ends_ptr,  # int64 [S], spans of tokens
    out_ptr, out_log_ptr,  # [slices,BT,H,P], [slices,BT,H] float32
    tokens, half_scale, feature_eps,
    reader_stride_t, reader_stride_h, writer_stride_t, writer_stride_h, payload_stride_t, payload_stride_h,
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    J_READER: tl.constexpr, J_WRITER: tl.constexpr, J_PAYLOAD: tl.constexpr,  # query heads of one of theirs
    RELU: tl.constexpr, REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, EMPTY_LOG: tl.constexpr, SPLIT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, OPERAND: tl.constexpr,
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
    state_at = (sequence * H + head) * M * (P + 2)

    sums, total, top = enter(first_ptr, state_at, m, p, in_m, in_p, P, HAS_FIRST, False, BLOCK_M, BLOCK_P)
    lost = tl.zeros_like(sums)
    passed = length - length
    while passed < length:
        t, in_seq = place(start, length, passed, step, REVERSE)
        written = load_columns(writer_ptr, t, writer_stride_t, n, in_seq, in_n)  # [BLOCK_N, CHUNK]
        read = load_rows(reader_ptr, t, reader_stride_t, n, in_seq, in_n)  # [CHUNK, BLOCK_N]
        payload = load_rows(payload_ptr, t, payload_stride_t, p, in_seq, in_p)  # [CHUNK, BLOCK_P]
        if REVERSE:
            below = tl.load(log_total_ptr + t * H + head, mask=in_seq, other=0.0)  # [CHUNK]
        else:
            below = half_square(written, half_scale, 0)
        log = project_tokens(
            writer_ptr, written, t, writer_stride_t, hi_ptr, lo_ptr, m, n, in_seq, in_m, in_n,
            N, SPLIT, True, CHUNK, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        features, scale, leaving, count = write(
            log, below, in_m[:, None] & in_seq[None, :], top, step, feature_eps, RELU, REVERSE, 1, CHUNK
        )  # fmt: skip
        dash = project_tokens(
            reader_ptr, read, t, reader_stride_t, hi_ptr, lo_ptr, m, n, in_seq, in_m, in_n,
            N, SPLIT, False, CHUNK, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        highest = tl.zeros([CHUNK], tl.float32)
        if RELU:
            queries = tl.where(in_m[None, :], tl.maximum(dash, 0.0) + feature_eps, 0.0)
        else:
            kept = exp(top - scale)
            sums *= kept[:, None]
            lost *= kept[:, None]
            total *= kept
            logits = tl.where(in_m[None, :], dash + scale[None, :], float("-inf"))
            if REVERSE:
                highest = half_square(read, half_scale, 1)
            else:
                highest = tl.max(logits, axis=1)
            queries = exp(logits - highest[:, None])
        scores = product(queries, features, OPERAND)  # [CHUNK, CHUNK]
        scores = tl.where(step[:, None] >= step[None, :], scores, 0.0)
        out = product(queries, sums, OPERAND) + product(scores, payload, OPERAND)  # [CHUNK, BLOCK_P]
        admitted = in_seq & (step < count)
        if not REVERSE:
            weight = tl.sum(queries * total[None, :], axis=1) + tl.sum(scores, axis=1)
            seen = weight > 0
            weight = tl.where(seen, weight, 1.0)
            out = out / weight[:, None]
            log_total = tl.where(seen, highest + tl.log(weight), EMPTY_LOG)
            tl.store(out_log_ptr + (slice_at + t) * H + head, log_total, mask=admitted)
        out_at = ((slice_at + t) * H + head)[:, None] * P + p[None, :]
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=admitted[:, None] & in_p[None, :])
        sums, lost = add_written(sums, lost, features, payload, OPERAND)
        total += tl.sum(features, axis=1)
        if not RELU:
            kept = exp(scale - leaving)
            sums *= kept[:, None]
            lost *= kept[:, None]
            total *= kept
        top = leaving
        passed += count
    if not REVERSE:
        leave(last_ptr + state_at, sums, total, top, m, p, in_m, in_p, P, False)

"""What causal readers read, by a lean walk in bfloat16: outputs in the forward, gradients of v in reverse."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.favor_attention.kernels.features import leave, load_projection
from zoo.ops.favor_attention.kernels.walk import enter_walk, multiply, natural
from zoo.ops.favor_attention.kernels.walk_lean import (
    LANES,
    beside_at,
    beside_readers,
    beside_weights,
    columns,
    dash_columns_of,
    dash_rows_of,
    features_of,
    fetch,
    first_writer,
    rows_of,
    seat,
    tile,
)
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import LN2


@launched(do_not_specialize=["tokens", "sequences", "width"])
def lean_read_kernel(
    reader_ptr, writer_ptr, payload_ptr,  # [BT,.,N] [BT,.,N] [BT,.,P]: q, k, v, or k, q, dy in reverse
    weights_ptr,  # [M,N], log2(e) N^-1/4 times the projection, float16
    reader_beside_ptr, writer_beside_ptr,  # [BT,.,LANES], see `beside_weights`; of readers in reverse only
    first_ptr, last_ptr,  # [S,H,M,P+2] float32, contiguous
    starts_ptr, ends_ptr,  # int64 [S], spans of tokens
    out_ptr, out_log_ptr,  # [parts,BT,H,P], [parts,BT,H] float32
    tokens, sequences, width,
    reader_stride_h, writer_stride_h, payload_stride_h,
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    J_READER: tl.constexpr, J_WRITER: tl.constexpr, J_PAYLOAD: tl.constexpr,  # query heads of one of theirs
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, EMPTY_LOG: tl.constexpr,
    READER_STRIDE: tl.constexpr, WRITER_STRIDE: tl.constexpr, PAYLOAD_STRIDE: tl.constexpr,  # from token to token
    CHUNK: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr, AHEAD: tl.constexpr,
    SHARE: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M features of one (sequence, head) and walks its tokens with their state."""
    place, part = seat(width, M // BLOCK_M, SHARE)
    if place >= sequences * H:
        return
    sequence = (place // H).to(tl.int64)
    head = (place % H).to(tl.int64)
    start = tl.load(starts_ptr + sequence)
    length = (tl.load(ends_ptr + sequence) - start).to(tl.int32)
    J_KEY: tl.constexpr = J_READER if REVERSE else J_WRITER
    G: tl.constexpr = H // J_KEY
    WRITER_HEADS: tl.constexpr = H if REVERSE else G
    step = tl.arange(0, CHUNK)
    m = part * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    in_m, in_n, in_p = m < M, n < N, p < P
    reader_ptr += start * READER_STRIDE + head // J_READER * reader_stride_h
    writer_ptr += start * WRITER_STRIDE + head // J_WRITER * writer_stride_h
    payload_ptr += start * PAYLOAD_STRIDE + head // J_PAYLOAD * payload_stride_h
    slot = (part.to(tl.int64) * tokens + start) * H + head
    out_ptr += slot * P
    if REVERSE:
        reader_beside_ptr += (start * G + head // J_KEY) * LANES
        writer_beside_ptr += (start * H + head) * LANES
    else:
        out_log_ptr += slot
        writer_beside_ptr += (start * G + head // J_KEY) * LANES
    state_at = (sequence * H + head) * M * (P + 2)
    weights = load_projection(weights_ptr, m, n, in_m, in_n, N)

    sums, total, top = enter_walk(first_ptr, state_at, m, p, in_m, in_p, P, HAS_FIRST, False, False, BLOCK_M, P)
    scale = top
    passed = length - length
    while passed < length:
        one = first_writer(
            writer_ptr, writer_beside_ptr, weights, tl.zeros_like(scale), length, passed, n,
            WRITER_STRIDE, WRITER_HEADS, REVERSE,
        )  # fmt: skip
        grown = tl.maximum(top, one)
        kept = tl.exp2(scale - grown)
        sums *= kept[:, None]
        total *= kept
        scale = grown
        top = grown
        beside_rows, beside_columns = beside_weights(scale, True), beside_weights(scale, False)
        chunk = tl.full([], 0, tl.int32)
        chunks = tl.minimum((length - passed + CHUNK - 1) // CHUNK, RUN)
        while chunk < chunks:
            left = tl.minimum(length - passed, CHUNK)
            in_seq = step < left
            # rows [CHUNK, width], columns [width, CHUNK]
            read = tile(reader_ptr, passed, length, step, n, in_seq, READER_STRIDE, REVERSE)
            written = columns(writer_ptr, passed, length, step, n, in_seq, WRITER_STRIDE, REVERSE)
            with_writer = beside_at(
                writer_beside_ptr, passed, length, step, in_seq, WRITER_HEADS, False, False, REVERSE
            )  # fmt: skip
            payload = tile(payload_ptr, passed, length, step, p, in_seq, PAYLOAD_STRIDE, REVERSE)
            if AHEAD:
                fetch(writer_ptr, passed, length, step, CHUNK, WRITER_STRIDE, REVERSE)
                fetch(reader_ptr, passed, length, step, CHUNK, READER_STRIDE, REVERSE)
                fetch(payload_ptr, passed, length, step, CHUNK, PAYLOAD_STRIDE, REVERSE)
            log = dash_columns_of(weights, beside_rows, written, with_writer)  # [BLOCK_M, CHUNK]
            features, peak, count = features_of(log, step, left, chunk == 0, 1, CHUNK)
            before = total
            total += tl.sum(features, axis=1)
            if not REVERSE:
                top = tl.maximum(top, peak + scale)
            features = features.to(tl.bfloat16)
            state = sums.to(tl.bfloat16)
            sums = multiply(features, payload, sums)
            if REVERSE:
                with_reader = beside_at(reader_beside_ptr, passed, length, step, in_seq, G, True, True, REVERSE)
            else:
                with_reader = beside_readers(CHUNK)
            logits = dash_rows_of(weights, beside_columns, read, with_reader)  # [CHUNK, BLOCK_M]
            highest = tl.zeros([CHUNK], tl.float32)
            if not REVERSE:
                highest = tl.max(logits, axis=1)
                logits -= highest[:, None]
            queries = tl.exp2(logits)
            weight = tl.zeros([CHUNK], tl.float32)
            if not REVERSE:
                weight = tl.sum(queries * before[None, :], axis=1)
            queries = queries.to(tl.bfloat16)
            scores = multiply(queries, features)  # [CHUNK, CHUNK]
            scores = tl.where(step[:, None] >= step[None, :], scores, 0.0)
            if not REVERSE:
                weight += tl.sum(scores, axis=1)
            scores = scores.to(tl.bfloat16)
            out = multiply(queries, state)
            out = multiply(scores, payload, out)  # [CHUNK, P]
            admitted = step < count
            if not REVERSE:
                seen = weight > 0
                weight = tl.where(seen, weight, 1.0)
                out *= (1.0 / weight)[:, None]
                begin, away = rows_of(passed, length, step, H, REVERSE)
                log_total = tl.where(seen, (highest + tl.log2(weight)) * LN2, EMPTY_LOG)
                tl.store(out_log_ptr + begin + away, log_total, mask=admitted)
            begin, away = rows_of(passed, length, step, H * P, REVERSE)
            at = out_ptr + begin + (away[:, None] + p[None, :])
            tl.store(at, out.to(out_ptr.dtype.element_ty), mask=admitted[:, None])
            passed += count
            chunk = tl.where(count < CHUNK, chunks, chunk + 1)
    if not REVERSE:
        kept = tl.exp2(scale - top)
        sums *= kept[:, None]
        total *= kept
        leave(last_ptr + state_at, sums, total, natural(top, False), m, p, in_m, in_p, P, False)

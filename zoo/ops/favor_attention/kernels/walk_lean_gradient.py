"""Gradients of causal readers by a lean walk in bfloat16: of q in the forward direction, of k in reverse."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.favor_attention.kernels.features import leave, load_projection
from zoo.ops.favor_attention.kernels.walk import enter_walk, multiply, natural
from zoo.ops.favor_attention.kernels.walk_lean import (
    LANES,
    beside_at,
    beside_weights,
    columns,
    dash_rows_of,
    features_of,
    fetch,
    first_writer,
    less_delta,
    rows_of,
    seat,
    tile,
)
from zoo.ops.kernels.launcher import launched


@launched(do_not_specialize=["tokens", "sequences", "width"])
def lean_gradient_kernel(
    reader_ptr, writer_ptr, beside_ptr, payload_ptr,  # [BT,.,N] [BT,.,N] [BT,.,P] [BT,.,P]: q, k, dy, v or k, q, v, dy
    weights_ptr, rows_ptr,  # [M,N] each: log2(e) N^-1/4 times the projection, float16; N^-1/4 times it, bfloat16
    reader_beside_ptr, writer_beside_ptr,  # [BT,.,LANES], see `beside_weights`
    delta_ptr,  # [BT,H] float32, <dy, y>; not in reverse
    first_ptr, last_ptr,  # [S,H,M,P+2] float32, contiguous
    starts_ptr, ends_ptr,  # int64 [S], spans of tokens
    grad_ptr,  # [parts,BT,H,N], without what |k'|^2 / 2 gives
    felt_ptr,  # [parts,BT,H] float32, gradients of logarithms summed over features; in reverse only
    tokens, sequences, width,
    reader_stride_h, writer_stride_h, beside_stride_h, payload_stride_h,
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, J_READER: tl.constexpr, J_WRITER: tl.constexpr,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr,
    READER_STRIDE: tl.constexpr, WRITER_STRIDE: tl.constexpr, BESIDE_STRIDE: tl.constexpr,  # from token to token
    PAYLOAD_STRIDE: tl.constexpr, CHUNK: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr, AHEAD: tl.constexpr,
    SHARE: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M features of one (sequence, head); see `causal_gradient_kernel` for what it computes."""
    place, part = seat(width, M // BLOCK_M, SHARE)
    if place >= sequences * H:
        return
    sequence = (place // H).to(tl.int64)
    head = (place % H).to(tl.int64)
    start = tl.load(starts_ptr + sequence)
    length = (tl.load(ends_ptr + sequence) - start).to(tl.int32)
    step = tl.arange(0, CHUNK)
    m = part * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    in_m, in_n, in_p = m < M, n < N, p < P
    J_KEY: tl.constexpr = J_READER if REVERSE else J_WRITER
    G: tl.constexpr = H // J_KEY
    READER_HEADS: tl.constexpr = G if REVERSE else H
    WRITER_HEADS: tl.constexpr = H if REVERSE else G
    reader_ptr += start * READER_STRIDE + head // J_READER * reader_stride_h
    beside_ptr += start * BESIDE_STRIDE + head // J_READER * beside_stride_h
    writer_ptr += start * WRITER_STRIDE + head // J_WRITER * writer_stride_h
    payload_ptr += start * PAYLOAD_STRIDE + head // J_WRITER * payload_stride_h
    reader_beside_ptr += (start * READER_HEADS + head // J_READER) * LANES
    writer_beside_ptr += (start * WRITER_HEADS + head // J_WRITER) * LANES
    if not REVERSE:
        delta_ptr += start * H + head
    slot = (part.to(tl.int64) * tokens + start) * H + head
    grad_ptr += slot * N
    if REVERSE:
        felt_ptr += slot
    state_at = (sequence * H + head) * M * (P + 2)
    weights = load_projection(weights_ptr, m, n, in_m, in_n, N)
    rows = load_projection(rows_ptr, m, n, in_m, in_n, N)

    sums, total, scale = enter_walk(first_ptr, state_at, m, p, in_m, in_p, P, HAS_FIRST, True, False, BLOCK_M, P)
    if REVERSE:
        total = -total
    masses = tl.zeros([CHUNK, BLOCK_M], tl.float32) + total[None, :]  # every row: sums of writers, of -delta in reverse
    passed = length - length
    while passed < length:
        one = first_writer(
            writer_ptr, writer_beside_ptr, weights, tl.zeros_like(scale), length, passed, n,
            WRITER_STRIDE, WRITER_HEADS, REVERSE,
        )  # fmt: skip
        grown = tl.maximum(scale, one)
        kept = tl.exp2(scale - grown)
        sums *= kept[None, :]
        masses *= kept[None, :]
        scale = grown
        beside_w = beside_weights(scale, False)
        chunk = tl.full([], 0, tl.int32)
        chunks = tl.minimum((length - passed + CHUNK - 1) // CHUNK, RUN)
        while chunk < chunks:
            left = tl.minimum(length - passed, CHUNK)
            in_seq = step < left
            # rows [CHUNK, width], columns [width, CHUNK]
            written = tile(writer_ptr, passed, length, step, n, in_seq, WRITER_STRIDE, REVERSE)
            with_writer = beside_at(writer_beside_ptr, passed, length, step, in_seq, WRITER_HEADS, False, True, REVERSE)
            payload = columns(payload_ptr, passed, length, step, p, in_seq, PAYLOAD_STRIDE, REVERSE)
            beside = tile(beside_ptr, passed, length, step, p, in_seq, BESIDE_STRIDE, REVERSE)
            with_reader = beside_at(reader_beside_ptr, passed, length, step, in_seq, READER_HEADS, True, True, REVERSE)
            if AHEAD:
                fetch(writer_ptr, passed, length, step, CHUNK, WRITER_STRIDE, REVERSE)
                fetch(payload_ptr, passed, length, step, CHUNK, PAYLOAD_STRIDE, REVERSE)
                fetch(beside_ptr, passed, length, step, CHUNK, BESIDE_STRIDE, REVERSE)
                fetch(reader_ptr, passed, length, step, CHUNK, READER_STRIDE, REVERSE)
            log = dash_rows_of(weights, beside_w, written, with_writer)  # [CHUNK, BLOCK_M]
            features, _peak, count = features_of(log, step, left, chunk == 0, 0, CHUNK)
            features = features.to(tl.bfloat16)
            less = less_delta(
                with_reader, writer_beside_ptr, passed, length, step, in_seq, WRITER_HEADS, REVERSE
            )  # fmt: skip
            if REVERSE:
                felt = multiply(beside, sums, masses)
                each = less
            else:
                begin, away = rows_of(passed, length, step, H, REVERSE)
                delta = tl.load(delta_ptr + begin + away, mask=in_seq, other=0.0)
                felt = multiply(beside, sums) - masses * delta[:, None]
                each = tl.full([CHUNK, CHUNK], 1.0, tl.float32)
            masses = multiply(each, features, masses)
            sums = multiply(payload, features, sums)
            pairs = multiply(beside, payload, less)  # [CHUNK, CHUNK]
            felt = multiply(tl.where(step[:, None] >= step[None, :], pairs, 0.0), features, felt)
            read = tile(reader_ptr, passed, length, step, n, in_seq, READER_STRIDE, REVERSE)
            felt *= tl.exp2(dash_rows_of(weights, beside_w, read, with_reader))
            grad = multiply(felt, rows)  # [CHUNK, N]
            admitted = step < count
            if REVERSE:
                begin, away = rows_of(passed, length, step, H, REVERSE)
                tl.store(felt_ptr + begin + away, tl.sum(felt, axis=1), mask=admitted)
            begin, away = rows_of(passed, length, step, H * N, REVERSE)
            at = grad_ptr + begin + (away[:, None] + n[None, :])
            tl.store(at, grad.to(grad_ptr.dtype.element_ty), mask=admitted[:, None])
            passed += count
            chunk = tl.where(count < CHUNK, chunks, chunk + 1)
    if REVERSE:
        total = -tl.sum(tl.where(step[:, None] == 0, masses, 0.0), axis=0)
        leave(last_ptr + state_at, sums, total, natural(scale, False), m, p, in_m, in_p, P, True)

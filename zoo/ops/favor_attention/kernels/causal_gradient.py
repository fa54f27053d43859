"""Gradients of causal readers: those of q in the forward direction, those of k in reverse."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.favor_attention.kernels.features import (
    add_written,
    enter,
    half_square,
    leave,
    load_columns,
    load_projection,
    load_rows,
    place,
    project_tokens,
    slope_of,
    write,
)
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import exp
from zoo.ops.semiseparable.kernels.decay import product


@launched(do_not_specialize=["tokens"])
def causal_gradient_kernel(
    reader_ptr, writer_ptr, beside_ptr, payload_ptr,  # [BT,.,N] [BT,.,N] [BT,.,P] [BT,.,P]: q, k, dy, v or k, q, v, dy
    hi_ptr, lo_ptr,  # [M,N] each, N^-1/4 times the projection
    log_total_ptr, delta_ptr,  # [BT,H] float32: logarithms of the queries' sums of weights; <dy, y>
    first_ptr, last_ptr,  # [S,H,M,P+2] float32, contiguous
    starts_ptr, ends_ptr,  # int64 [S], spans of tokens
    grad_ptr,  # [slices,BT,H,N], [slices,BT,H] if BALANCE
    tokens, half_scale, feature_eps,
    reader_stride_t, reader_stride_h, writer_stride_t, writer_stride_h,
    beside_stride_t, beside_stride_h, payload_stride_t, payload_stride_h,
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, J_READER: tl.constexpr, J_WRITER: tl.constexpr,
    RELU: tl.constexpr, REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, SPLIT: tl.constexpr, BALANCE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M features of one (sequence, head) and walks its tokens with their state.

    The gradient of a reader's logarithm i, r is exp(reader_ir) sum_j exp(writer_jr) (<dy, v> - delta), over queries of
    keys or keys of queries. `beside` is what stands at the reader (dy or v), `payload` at the writer (v or dy).
    BALANCE: its sum over the features of the program alone.
    """
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
    state_at = (sequence * H + head) * M * (P + 2)

    sums, total, top = enter(first_ptr, state_at, m, p, in_m, in_p, P, HAS_FIRST, True, BLOCK_M, BLOCK_P)
    lost = tl.zeros_like(sums)
    passed = length - length
    while passed < length:
        t, in_seq = place(start, length, passed, step, REVERSE)
        written = load_rows(writer_ptr, t, writer_stride_t, n, in_seq, in_n)  # [CHUNK, BLOCK_N]
        read = load_rows(reader_ptr, t, reader_stride_t, n, in_seq, in_n)  # [CHUNK, BLOCK_N]
        beside = load_rows(beside_ptr, t, beside_stride_t, p, in_seq, in_p)  # [CHUNK, BLOCK_P]
        payload = load_columns(payload_ptr, t, payload_stride_t, p, in_seq, in_p)  # [BLOCK_P, CHUNK]
        log_total = tl.load(log_total_ptr + t * H + head, mask=in_seq, other=0.0)  # [CHUNK]
        delta = tl.load(delta_ptr + t * H + head, mask=in_seq, other=0.0)
        one = tl.full([CHUNK], 1.0, tl.float32)
        if REVERSE:
            below_read, below_written = half_square(read, half_scale, 1), log_total
            weight, mass = one, delta
        else:
            below_read, below_written = log_total, half_square(written, half_scale, 1)
            weight, mass = delta, one
        log = project_tokens(
            writer_ptr, written, t, writer_stride_t, hi_ptr, lo_ptr, m, n, in_seq, in_m, in_n,
            N, SPLIT, False, CHUNK, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        features, scale, leaving, count = write(
            log, below_written, in_m[None, :] & in_seq[:, None], top, step, feature_eps, RELU, REVERSE, 0, CHUNK
        )  # fmt: skip
        dash = project_tokens(
            reader_ptr, read, t, reader_stride_t, hi_ptr, lo_ptr, m, n, in_seq, in_m, in_n,
            N, SPLIT, False, CHUNK, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if not RELU:
            kept = exp(top - scale)
            sums *= kept[None, :]
            lost *= kept[None, :]
            total *= kept
        slope = slope_of(dash, below_read, scale, in_m, RELU, REVERSE)
        pairs = product(beside, payload, OPERAND) - weight[:, None] * mass[None, :]  # [CHUNK, CHUNK]
        pairs = tl.where(step[:, None] >= step[None, :], pairs, 0.0)
        felt = product(beside, sums, OPERAND) - weight[:, None] * total[None, :]
        felt = (felt + product(pairs, features, OPERAND)) * slope  # [CHUNK, BLOCK_M], gradient of <w, x'>
        admitted = in_seq & (step < count)
        grad_at = (slice_at + t) * H + head
        if BALANCE:
            tl.store(grad_ptr + grad_at, tl.sum(felt, axis=1), mask=admitted)
        else:
            grad = product(felt, load_projection(hi_ptr, m, n, in_m, in_n, N), OPERAND)  # [CHUNK, BLOCK_N]
            if REVERSE and not RELU:
                grad -= read.to(tl.float32) * (tl.sum(felt, axis=1) * (2.0 * half_scale))[:, None]
            grad_at = grad_at[:, None] * N + n[None, :]
            tl.store(grad_ptr + grad_at, grad.to(grad_ptr.dtype.element_ty), mask=admitted[:, None] & in_n[None, :])
        sums, lost = add_written(sums, lost, payload, features, OPERAND)
        total += tl.sum(features * mass[:, None], axis=0)
        if not RELU:
            kept = exp(scale - leaving)
            sums *= kept[None, :]
            lost *= kept[None, :]
            total *= kept
        top = leaving
        passed += count
    if REVERSE:
        leave(last_ptr + state_at, sums, total, top, m, p, in_m, in_p, P, True)

"""FAVOR+ attention over whole sequences: writers are summed up first, then every reader reads the sums."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.favor_attention.kernels.features import (
    LEAST,
    enter,
    half_square,
    leave,
    load_columns,
    load_projection,
    load_rows,
    load_scales,
    load_sums,
    project_columns,
    project_rows,
    slope_of,
)
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import exp
from zoo.ops.semiseparable.kernels.decay import product


@launched
def whole_sum_kernel(
    writer_ptr, payload_ptr,  # [BT,.,N] [BT,.,P]: k, v, or q, dy in reverse
    hi_ptr, lo_ptr,  # [M,N] each, N^-1/4 times the projection
    log_total_ptr, delta_ptr,  # [BT,H] float32, in reverse only: logarithms of sums of weights; <dy, y>
    first_ptr, last_ptr,  # [S,H,M,P+2] float32, contiguous; first in reverse only
    starts_ptr, ends_ptr,  # int64 [S], spans of writers
    half_scale, feature_eps, writer_stride_t, writer_stride_h, payload_stride_t, payload_stride_h,
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, J_WRITER: tl.constexpr,
    RELU: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M features of one (sequence, head) and sums over its writers."""
    sequence = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    start = tl.load(starts_ptr + sequence)
    end = tl.load(ends_ptr + sequence)
    step = tl.arange(0, CHUNK)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    in_m, in_n, in_p = m < M, n < N, p < P
    state_at = (sequence * H + head) * M * (P + 2)
    writer_ptr += head // J_WRITER * writer_stride_h
    payload_ptr += head // J_WRITER * payload_stride_h

    sums, total, top = enter(first_ptr, state_at, m, p, in_m, in_p, P, REVERSE, False, BLOCK_M, BLOCK_P)
    for chunk in range(0, ((end - start + CHUNK - 1) // CHUNK).to(tl.int32)):
        t = start + chunk * CHUNK + step
        in_seq = t < end
        written = load_columns(writer_ptr, t, writer_stride_t, n, in_seq, in_n)  # [BLOCK_N, CHUNK]
        write = project_columns(written, hi_ptr, lo_ptr, m, n, in_m, in_n, N, SPLIT)  # [BLOCK_M, CHUNK]
        payload = load_rows(payload_ptr, t, payload_stride_t, p, in_seq, in_p)  # [CHUNK, BLOCK_P]
        if REVERSE:
            below = tl.load(log_total_ptr + t * H + head, mask=in_seq, other=0.0)  # [CHUNK]
            mass = tl.load(delta_ptr + t * H + head, mask=in_seq, other=0.0)
        else:
            below = half_square(written, half_scale, 0)
            mass = tl.full([CHUNK], 1.0, tl.float32)
        present = in_m[:, None] & in_seq[None, :]
        if RELU:
            features = tl.where(present, tl.maximum(write, 0.0) + feature_eps, 0.0)
            if REVERSE:
                features *= exp(-below)[None, :]
            top = tl.zeros([BLOCK_M], tl.float32)
        else:
            write = tl.where(present, write - below[None, :], float("-inf"))
            grown = tl.maximum(top, tl.max(write, axis=1))
            kept = exp(top - grown)
            features = exp(write - grown[:, None])
            sums *= kept[:, None]
            total *= kept
            top = grown
        sums += product(features, payload, OPERAND)
        total += tl.sum(features * mass[None, :], axis=1)
    leave(last_ptr + state_at, sums, total, top, m, p, in_m, in_p, P, False)


@launched
def whole_read_kernel(
    reader_ptr, hi_ptr, lo_ptr, sums_ptr,  # [BT,.,N]: q, or k in reverse; [M,N] each; [S,H,M,P+2] float32
    owner_ptr, origin_ptr, ends_ptr,  # int64 [blocks], [blocks], [S]: sequence and first token of each block of readers
    out_ptr, log_total_ptr,  # [BT,H,P], [BT,H] float32
    half_scale, feature_eps, reader_stride_t, reader_stride_h,
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, J_READER: tl.constexpr,
    RELU: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One program owns CHUNK readers of one head: their outputs, or the gradients of v in reverse."""
    block = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    sequence = tl.load(owner_ptr + block)
    origin = tl.load(origin_ptr + block)
    end = tl.load(ends_ptr + sequence)
    if origin >= end:
        return
    t = origin + tl.arange(0, CHUNK)
    in_seq = t < end
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    in_n, in_p = n < N, p < P
    state_at = (sequence * H + head) * M * (P + 2)
    rows = load_rows(reader_ptr + head // J_READER * reader_stride_h, t, reader_stride_t, n, in_seq, in_n)

    out = tl.zeros([CHUNK, BLOCK_P], tl.float32)
    weight = tl.zeros([CHUNK], tl.float32)
    highest = tl.full([CHUNK], LEAST, tl.float32)
    if RELU:
        highest = tl.zeros([CHUNK], tl.float32)
    elif REVERSE:
        highest = half_square(rows, half_scale, 1)
    for part in range(0, (M + BLOCK_M - 1) // BLOCK_M):
        m = part * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = m < M
        sums = load_sums(sums_ptr + state_at, m, p, in_m, in_p, P, False)  # [BLOCK_M, BLOCK_P]
        total, top = load_scales(sums_ptr + state_at, m, in_m, P)
        read = project_rows(rows, hi_ptr, lo_ptr, m, n, in_m, in_n, N, SPLIT)  # [CHUNK, BLOCK_M]
        if RELU:
            features = tl.where(in_m[None, :], tl.maximum(read, 0.0) + feature_eps, 0.0)
        else:
            logits = tl.where(in_m[None, :], read + top[None, :], float("-inf"))
            if not REVERSE:
                grown = tl.maximum(highest, tl.max(logits, axis=1))
                kept = exp(highest - grown)
                out *= kept[:, None]
                weight *= kept
                highest = grown
            features = exp(logits - highest[:, None])
        out += product(features, sums, OPERAND)
        weight += tl.sum(features * total[None, :], axis=1)
    if not REVERSE:
        seen = weight > 0
        weight = tl.where(seen, weight, 1.0)
        out = out / weight[:, None]
        log_total = tl.where(seen, highest + tl.log(weight), float("inf"))
        tl.store(log_total_ptr + t * H + head, log_total, mask=in_seq)
    out_at = (t * H + head)[:, None] * P + p[None, :]
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=in_seq[:, None] & in_p[None, :])


@launched
def whole_gradient_kernel(
    reader_ptr, beside_ptr, hi_ptr, lo_ptr, sums_ptr,  # q, dy, or k, v in reverse; [M,N] each; [S,H,M,P+2] float32
    log_total_ptr, delta_ptr,  # [BT,H] float32, in the forward direction only
    owner_ptr, origin_ptr, ends_ptr,  # int64 [blocks], [blocks], [S]: sequence and first token of each block of readers
    grad_ptr,  # [BT,H,N], [BT,H] if BALANCE
    half_scale, reader_stride_t, reader_stride_h, beside_stride_t, beside_stride_h,
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, J_READER: tl.constexpr,
    RELU: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr, BALANCE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One program owns CHUNK readers of one head: their gradient, as in `causal_gradient_kernel`."""
    block = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    sequence = tl.load(owner_ptr + block)
    origin = tl.load(origin_ptr + block)
    end = tl.load(ends_ptr + sequence)
    if origin >= end:
        return
    t = origin + tl.arange(0, CHUNK)
    in_seq = t < end
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    in_n, in_p = n < N, p < P
    state_at = (sequence * H + head) * M * (P + 2)
    rows = load_rows(reader_ptr + head // J_READER * reader_stride_h, t, reader_stride_t, n, in_seq, in_n)
    beside = load_rows(beside_ptr + head // J_READER * beside_stride_h, t, beside_stride_t, p, in_seq, in_p)
    if REVERSE:
        below = half_square(rows, half_scale, 1)  # [CHUNK]
        weight = tl.full([CHUNK], 1.0, tl.float32)
    else:
        below = tl.load(log_total_ptr + t * H + head, mask=in_seq, other=0.0)
        weight = tl.load(delta_ptr + t * H + head, mask=in_seq, other=0.0)

    grad = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    along = tl.zeros([CHUNK], tl.float32)
    for part in range(0, (M + BLOCK_M - 1) // BLOCK_M):
        m = part * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = m < M
        sums = load_sums(sums_ptr + state_at, m, p, in_m, in_p, P, True)  # [BLOCK_P, BLOCK_M]
        total, top = load_scales(sums_ptr + state_at, m, in_m, P)
        read = project_rows(rows, hi_ptr, lo_ptr, m, n, in_m, in_n, N, SPLIT)  # [CHUNK, BLOCK_M]
        slope = slope_of(read, below, top, in_m, RELU, REVERSE)
        felt = (product(beside, sums, OPERAND) - weight[:, None] * total[None, :]) * slope
        if not BALANCE:
            grad += product(felt, load_projection(hi_ptr, m, n, in_m, in_n, N), OPERAND)
        along += tl.sum(felt, axis=1)
    if REVERSE and not RELU:
        grad -= rows.to(tl.float32) * (along * (2.0 * half_scale))[:, None]
    if BALANCE:
        tl.store(grad_ptr + t * H + head, along, mask=in_seq)
    else:
        grad_at = (t * H + head)[:, None] * N + n[None, :]
        tl.store(grad_ptr + grad_at, grad.to(grad_ptr.dtype.element_ty), mask=in_seq[:, None] & in_n[None, :])

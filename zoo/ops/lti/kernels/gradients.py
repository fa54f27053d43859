"""Gradients of what all sequences share: the taps inside a chunk, the weights of the modes, and the modes."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.diagonals import diagonal_sums
from zoo.ops.lti.kernels.pieces import advance, load_chunk, load_powers, load_states, load_step, row_block
from zoo.ops.semiseparable.kernels.decay import product


@triton.jit(do_not_specialize=["rows"])
def shared_gradient_kernel(
    x_ptr, dy_ptr, power_ptr, step_ptr,  # [D,BT] by strides, twice; [D,2,M,CHUNK+1] and [D,4,M] float32
    start_ptr, length_ptr,  # int64 [rows], int32 [rows]
    states_ptr, slopes_ptr,  # [rows,2,D,M] float32: the state before each row, and its derivative in log_a
    dtaps_ptr, sums_ptr,  # [blocks,D,CHUNK] and [blocks,4,D,M] float32
    rows, x_stride_d, x_stride_t, dy_stride_d, dy_stride_t,
    D: tl.constexpr, M: tl.constexpr, LAG: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS rows of one channel. With S the state before a chunk, W its derivative in log_a, and
    U = sum_i dy_i e^{l_i log_a}, V = sum_i l_i dy_i e^{l_i log_a} over its tokens, l_i = i + 1 - LAG:

    sums_ptr gets sum U S (re, im), of which the gradient of c is made, and sum U W + V S (re, im), for that of log_a;
    dtaps_ptr the sum of dy_i x_j over the pairs of a chunk, by lag i - j.
    """
    channel = (tl.program_id(0) % D).to(tl.int64)
    block = (tl.program_id(0) // D).to(tl.int64)
    row, start, length, longest = row_block(start_ptr, length_ptr, block, rows, ROWS)
    x_ptr += channel * x_stride_d
    dy_ptr += channel * dy_stride_d
    k = tl.arange(0, CHUNK)
    m = tl.arange(0, BLOCK_M)
    re, im, lost_re, lost_im = load_step(step_ptr, channel, m, M, False)
    into_re, into_im = load_powers(power_ptr, channel, CHUNK - 1 - k[:, None], m[None, :], M, CHUNK)
    seen_re, seen_im = load_powers(power_ptr, channel, k[:, None] + 1 - LAG, m[None, :], M, CHUNK)
    age = (CHUNK - 1 - k).to(tl.float32)[:, None]
    lag = (k + 1 - LAG).to(tl.float32)[:, None]

    s_re, s_im = load_states(states_ptr, row, length, channel, m, D, M)
    w_re, w_im = load_states(slopes_ptr, row, length, channel, m, D, M)
    dc_re = tl.zeros([BLOCK_M], tl.float32)
    dc_im = tl.zeros([BLOCK_M], tl.float32)
    da_re = tl.zeros([BLOCK_M], tl.float32)
    da_im = tl.zeros([BLOCK_M], tl.float32)
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)  # [i, j]
    chunks = ((longest + CHUNK - 1) // CHUNK).to(tl.int32)
    for chunk in range(0, chunks):
        t = (chunk * CHUNK + k)[None, :] + tl.zeros([ROWS, 1], tl.int32)
        x = load_chunk(x_ptr, start, t, length, x_stride_t)  # [ROWS, CHUNK]
        dy = load_chunk(dy_ptr, start, t, length, dy_stride_t)
        pairs += product(tl.trans(dy), x, OPERAND)
        u_re = product(dy, seen_re, OPERAND)
        u_im = product(dy, seen_im, OPERAND)
        dc_re += tl.sum(u_re * s_re - u_im * s_im, axis=0)
        dc_im += tl.sum(u_re * s_im + u_im * s_re, axis=0)
        v_re = product(dy, seen_re * lag, OPERAND)
        v_im = product(dy, seen_im * lag, OPERAND)
        da_re += tl.sum((u_re * w_re - u_im * w_im) + (v_re * s_re - v_im * s_im), axis=0)
        da_im += tl.sum((u_re * w_im + u_im * w_re) + (v_re * s_im + v_im * s_re), axis=0)
        w_re, w_im = advance(w_re + CHUNK * s_re, w_im + CHUNK * s_im, re, im, lost_re, lost_im)
        w_re += product(x, into_re * age, OPERAND)
        w_im += product(x, into_im * age, OPERAND)
        s_re, s_im = advance(s_re, s_im, re, im, lost_re, lost_im)
        s_re += product(x, into_re, OPERAND)
        s_im += product(x, into_im, OPERAND)

    sums = sums_ptr + (block * 4 * D + channel) * M + m
    tl.store(sums, dc_re, mask=m < M)
    tl.store(sums + D * M, dc_im, mask=m < M)
    tl.store(sums + 2 * D * M, da_re, mask=m < M)
    tl.store(sums + 3 * D * M, da_im, mask=m < M)
    dtaps, _ = diagonal_sums(pairs, CHUNK)
    tl.store(dtaps_ptr + (block * D + channel) * CHUNK + k, dtaps)

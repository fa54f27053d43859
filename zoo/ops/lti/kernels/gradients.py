"""Gradients of what all sequences share: the taps inside a chunk, the weights of the modes, and the modes."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.kernels.diagonals import diagonal_sums
from zoo.ops.kernels.launcher import launched
from zoo.ops.lti.kernels.pieces import advance, load_chunk, load_powers, load_states, load_step, row_block
from zoo.ops.semiseparable.kernels.decay import product


@launched(do_not_specialize=["rows"])
def shared_gradient_kernel(
    x_ptr, dy_ptr, power_ptr, step_ptr,  # [D,BT] by strides, twice; [D,2,CHUNK+1,M] and [D,4,M] float32
    start_ptr, length_ptr,  # int64 [rows], int32 [rows]
    states_ptr, slopes_ptr,  # [rows,2,D,M] float32: the state before each row, and its derivative in log_a
    dtaps_ptr, sums_ptr,  # [blocks,D,CHUNK] and [blocks,4,D,M] float32
    rows, tokens, x_stride_d, x_stride_t, dy_stride_d, dy_stride_t,
    D: tl.constexpr, M: tl.constexpr, LAG: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, OPERAND: tl.constexpr,
    SEGMENT: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS rows of one channel. With S the state before a chunk, W its derivative in log_a, and
    U = sum_i dy_i e^{l_i log_a}, V = sum_i l_i dy_i e^{l_i log_a} over its tokens, l_i = i + 1 - LAG:

    sums_ptr gets sum U S (re, im), of which the gradient of c is made, and sum U W + V S (re, im), for that of log_a;
    dtaps_ptr the sum of dy_i x_j over the pairs of a chunk, by lag i - j. Over chunks dy_i S and dy_i W are summed for
    each place i of a chunk, which is a matrix product; the powers come in once, at the end.
    """
    channel = (tl.program_id(0) % D).to(tl.int64)
    block = (tl.program_id(0) // D).to(tl.int64)
    row, start, length, longest = row_block(
        start_ptr, length_ptr, block, rows, tokens, ROWS, CHUNK, SEGMENT, PACKED, WHOLE
    )
    x_ptr += channel * x_stride_d
    dy_ptr += channel * dy_stride_d
    k = tl.arange(0, CHUNK)
    m = tl.arange(0, BLOCK_M)
    re, im, lost_re, lost_im = load_step(step_ptr, channel, m, M, False)
    into_re, into_im = load_powers(power_ptr, channel, CHUNK - 1 - k[:, None], m[None, :], M, CHUNK)
    age = (CHUNK - 1 - k).to(tl.float32)[:, None]

    s_re, s_im = load_states(states_ptr, row, length, channel, m, D, M)
    w_re, w_im = load_states(slopes_ptr, row, length, channel, m, D, M)
    read_re = tl.zeros([CHUNK, BLOCK_M], tl.float32)  # sum of dy_i S
    read_im = tl.zeros([CHUNK, BLOCK_M], tl.float32)
    slope_re = tl.zeros([CHUNK, BLOCK_M], tl.float32)  # sum of dy_i W
    slope_im = tl.zeros([CHUNK, BLOCK_M], tl.float32)
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)  # [i, j]
    chunks = ((longest + CHUNK - 1) // CHUNK).to(tl.int32)
    for chunk in range(0, chunks):
        first = tl.zeros([ROWS], tl.int32) + chunk * CHUNK
        x = load_chunk(x_ptr, start, first, length, x_stride_t, CHUNK, WHOLE)  # [ROWS, CHUNK]
        dy = load_chunk(dy_ptr, start, first, length, dy_stride_t, CHUNK, WHOLE)
        dy_t = tl.trans(dy)
        pairs += product(dy_t, x, OPERAND)
        read_re += product(dy_t, s_re, OPERAND)
        read_im += product(dy_t, s_im, OPERAND)
        slope_re += product(dy_t, w_re, OPERAND)
        slope_im += product(dy_t, w_im, OPERAND)
        w_re, w_im = advance(w_re + CHUNK * s_re, w_im + CHUNK * s_im, re, im, lost_re, lost_im)
        w_re += product(x, into_re * age, OPERAND)
        w_im += product(x, into_im * age, OPERAND)
        s_re, s_im = advance(s_re, s_im, re, im, lost_re, lost_im)
        s_re += product(x, into_re, OPERAND)
        s_im += product(x, into_im, OPERAND)

    seen_re, seen_im = load_powers(power_ptr, channel, k[:, None] + 1 - LAG, m[None, :], M, CHUNK)
    lag = (k + 1 - LAG).to(tl.float32)[:, None]
    c_re = seen_re * read_re - seen_im * read_im
    c_im = seen_re * read_im + seen_im * read_re
    a_re = (seen_re * slope_re - seen_im * slope_im) + lag * c_re
    a_im = (seen_re * slope_im + seen_im * slope_re) + lag * c_im
    sums = sums_ptr + (block * 4 * D + channel) * M + m
    tl.store(sums, tl.sum(c_re, axis=0), mask=m < M)
    tl.store(sums + D * M, tl.sum(c_im, axis=0), mask=m < M)
    tl.store(sums + 2 * D * M, tl.sum(a_re, axis=0), mask=m < M)
    tl.store(sums + 3 * D * M, tl.sum(a_im, axis=0), mask=m < M)
    dtaps, _ = diagonal_sums(pairs, CHUNK)
    tl.store(dtaps_ptr + (block * D + channel) * CHUNK + k, dtaps)

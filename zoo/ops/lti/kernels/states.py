"""What each row of tokens adds to the state at its end, and the scan of states over the rows of a sequence."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.lti.kernels.phases import exponential
from zoo.ops.lti.kernels.pieces import (
    advance,
    load_chunk,
    load_powers,
    load_step,
    load_weights,
    row_block,
    store_states,
)
from zoo.ops.semiseparable.kernels.decay import product


@launched(do_not_specialize=["rows"])
def added_kernel(
    x_ptr, power_ptr, c_ptr, step_ptr,  # [D,BT] by strides; [D,2,CHUNK+1,M], [D,M,2] and [D,4,M] float32
    start_ptr, length_ptr,  # int64 [rows], int32 [rows]
    added_ptr, weighted_ptr,  # [rows,2,D,M] float32
    rows, tokens, x_stride_d, x_stride_t,
    D: tl.constexpr, M: tl.constexpr, LAG: tl.constexpr, REVERSE: tl.constexpr, WEIGHTED: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, OPERAND: tl.constexpr,
    SEGMENT: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS rows of one channel.

    Forward: sum_j e^{(L-1-j) log_a} x_j over the L tokens of a row. Chunks end where the row ends, so that a short one
    comes first, before which the state is 0. WEIGHTED: the derivative of that in log_a too, each term times L-1-j.
    In reverse x is the gradient of the outputs, and the sum the gradient of the state before the row; there a short
    chunk comes last, and is the first to be visited.
    """
    channel = (tl.program_id(0) % D).to(tl.int64)
    row, start, length, longest = row_block(
        start_ptr, length_ptr, tl.program_id(0) // D, rows, tokens, ROWS, CHUNK, SEGMENT, PACKED, WHOLE
    )
    x_ptr += channel * x_stride_d
    k = tl.arange(0, CHUNK)
    m = tl.arange(0, BLOCK_M)
    re, im, lost_re, lost_im = load_step(step_ptr, channel, m, M, REVERSE)
    if REVERSE:
        into_re, into_im = load_powers(power_ptr, channel, k[:, None] + 1 - LAG, m[None, :], M, CHUNK)
        c_re, c_im = load_weights(c_ptr, channel, m, M)
        seen_re = c_re[None, :] * into_re - c_im[None, :] * into_im
        into_im = -(c_re[None, :] * into_im + c_im[None, :] * into_re)
        into_re = seen_re
    else:
        into_re, into_im = load_powers(power_ptr, channel, CHUNK - 1 - k[:, None], m[None, :], M, CHUNK)
    age = (CHUNK - 1 - k).to(tl.float32)[:, None]

    s_re = tl.zeros([ROWS, BLOCK_M], tl.float32)
    s_im = tl.zeros([ROWS, BLOCK_M], tl.float32)
    w_re = tl.zeros([ROWS, BLOCK_M], tl.float32)
    w_im = tl.zeros([ROWS, BLOCK_M], tl.float32)
    chunks = ((longest + CHUNK - 1) // CHUNK).to(tl.int32)
    for count in range(0, chunks):
        done = (chunks - 1 - count) * CHUNK
        if REVERSE:
            first = tl.zeros([ROWS], tl.int32) + done
        else:
            first = length - done - CHUNK
        x = load_chunk(x_ptr, start, first, length, x_stride_t, CHUNK, WHOLE)  # [ROWS, CHUNK]
        if WEIGHTED:
            w_re, w_im = advance(w_re + CHUNK * s_re, w_im + CHUNK * s_im, re, im, lost_re, lost_im)
            w_re += product(x, into_re * age, OPERAND)
            w_im += product(x, into_im * age, OPERAND)
        s_re, s_im = advance(s_re, s_im, re, im, lost_re, lost_im)
        s_re += product(x, into_re, OPERAND)
        s_im += product(x, into_im, OPERAND)
    store_states(added_ptr, row, length, channel, m, s_re, s_im, D, M)
    if WEIGHTED:
        store_states(weighted_ptr, row, length, channel, m, w_re, w_im, D, M)


@launched(do_not_specialize=["segment", "tokens"])
def carry_kernel(
    added_ptr, weighted_ptr,  # [rows,2,D M] float32
    first_ptr, log_a_ptr,  # [S,2,D M] float32, [D M,2]
    row_ptr, count_ptr, length_ptr,  # int64, int32, int32 [S], PACKED: first row, rows, tokens of the last
    states_ptr, slopes_ptr, last_ptr, last_slope_ptr,  # [rows,2,D M] twice, [S,2,D M] twice, float32
    modes, segment, tokens,
    HAS_FIRST: tl.constexpr, WEIGHTED: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK modes, of any channels, of one sequence and walks over its rows, in float64.

    Forward: the state before each row, and the last one; WEIGHTED: their derivatives in log_a too. In reverse: the
    gradient of the state after each row, and that of the initial state. Rows but the last have `segment` tokens.
    """
    blocks = (modes + BLOCK - 1) // BLOCK
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    e = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = e < modes
    if PACKED:
        first_row = tl.load(row_ptr + sequence)
        count = tl.load(count_ptr + sequence)
        tail = tl.load(length_ptr + sequence)
    else:
        count = (tokens + segment - 1) // segment
        first_row = sequence * count
        tail = tokens - (count - 1) * segment
    rate = tl.load(log_a_ptr + e * 2, mask=mask, other=0.0).to(tl.float64)
    angle = tl.load(log_a_ptr + e * 2 + 1, mask=mask, other=0.0).to(tl.float64)
    full_re, full_im = exponential(rate, angle, segment.to(tl.float64))
    tail_re, tail_im = exponential(rate, angle, tail.to(tl.float64))
    s_re = tl.zeros([BLOCK], tl.float64)
    s_im = tl.zeros([BLOCK], tl.float64)
    w_re = tl.zeros([BLOCK], tl.float64)
    w_im = tl.zeros([BLOCK], tl.float64)
    if HAS_FIRST:
        s_re += tl.load(first_ptr + sequence * 2 * modes + e, mask=mask, other=0.0)
        s_im += tl.load(first_ptr + sequence * 2 * modes + modes + e, mask=mask, other=0.0)
    for turn in tl.range(0, count, num_stages=4):  # what rows add is loaded ahead
        if REVERSE:
            index = count - 1 - turn
        else:
            index = turn
        at = (first_row + index) * 2 * modes + e
        tl.store(states_ptr + at, s_re.to(tl.float32), mask=mask)
        tl.store(states_ptr + at + modes, s_im.to(tl.float32), mask=mask)
        ends = index == count - 1
        re = tl.where(ends, tail_re, full_re)
        im = tl.where(ends, tail_im, full_im)
        if WEIGHTED:
            tl.store(slopes_ptr + at, w_re.to(tl.float32), mask=mask)
            tl.store(slopes_ptr + at + modes, w_im.to(tl.float32), mask=mask)
            passed = tl.where(ends, tail, segment).to(tl.float64)
            moved_re = w_re + passed * s_re
            moved_im = w_im + passed * s_im
            w_re = moved_re * re - moved_im * im + tl.load(weighted_ptr + at, mask=mask, other=0.0)
            w_im = moved_re * im + moved_im * re + tl.load(weighted_ptr + at + modes, mask=mask, other=0.0)
        if REVERSE:
            im = -im
        next_re = s_re * re - s_im * im + tl.load(added_ptr + at, mask=mask, other=0.0)
        s_im = s_re * im + s_im * re + tl.load(added_ptr + at + modes, mask=mask, other=0.0)
        s_re = next_re
    at = sequence * 2 * modes + e
    tl.store(last_ptr + at, s_re.to(tl.float32), mask=mask)
    tl.store(last_ptr + at + modes, s_im.to(tl.float32), mask=mask)
    if WEIGHTED:
        tl.store(last_slope_ptr + at, w_re.to(tl.float32), mask=mask)
        tl.store(last_slope_ptr + at + modes, w_im.to(tl.float32), mask=mask)

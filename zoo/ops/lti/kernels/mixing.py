"""The outputs of the diagonal scan, and, backward in time, the gradient of its inputs: the same sum mirrored."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.lti.kernels.pieces import (
    advance,
    inside_rows,
    load_chunk,
    load_powers,
    load_states,
    load_step,
    load_tile,
    load_weights,
    row_block,
)
from zoo.ops.semiseparable.kernels.decay import product


@launched(do_not_specialize=["rows"])
def mix_kernel(
    x_ptr, power_ptr, c_ptr,  # [D,BT] by strides; [D,2,CHUNK+1,M] float32, and [D,M,2]
    taps_ptr, step_ptr,  # [D,CHUNK] and [D,4,M] float32
    start_ptr, length_ptr, states_ptr,  # int64 [rows], int32 [rows], [rows,2,D,M] float32
    y_ptr,  # [D,BT] by strides; ONTO: what is there already, float32, is added
    rows, tokens, x_stride_d, x_stride_t, y_stride_d, y_stride_t,
    D: tl.constexpr, M: tl.constexpr, LAG: tl.constexpr, REVERSE: tl.constexpr, ONTO: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, OPERAND: tl.constexpr,
    SEGMENT: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS rows of one channel and walks over their chunks with the state in registers.

    Forward: states_ptr is the state before each row; chunks begin where the row begins. In reverse: x is the gradient
    of the outputs, y that of the inputs, states_ptr the gradient of the state after each row; chunks end where the row
    ends, the first of them may be short. That is also the kernel ahead, with x the tokens and an empty state after.
    """
    channel = (tl.program_id(0) % D).to(tl.int64)
    row, start, length, longest = row_block(
        start_ptr, length_ptr, tl.program_id(0) // D, rows, tokens, ROWS, CHUNK, SEGMENT, PACKED, WHOLE
    )
    x_ptr += channel * x_stride_d
    y_ptr += channel * y_stride_d
    k = tl.arange(0, CHUNK)
    m = tl.arange(0, BLOCK_M)
    tile = load_tile(taps_ptr, channel, CHUNK, REVERSE)  # [CHUNK, CHUNK]
    re, im, lost_re, lost_im = load_step(step_ptr, channel, m, M, REVERSE)
    c_re, c_im = load_weights(c_ptr, channel, m, M)
    if REVERSE:  # in: gradient of the state that the chunk's tokens read; out: what they have written
        a_re, a_im = load_powers(power_ptr, channel, k[:, None] + 1 - LAG, m[None, :], M, CHUNK)
        into_re = c_re[None, :] * a_re - c_im[None, :] * a_im  # [CHUNK, BLOCK_M]
        into_im = -(c_re[None, :] * a_im + c_im[None, :] * a_re)
        out_re, out_im = load_powers(power_ptr, channel, CHUNK - 1 - k[None, :], m[:, None], M, CHUNK)
    else:
        into_re, into_im = load_powers(power_ptr, channel, CHUNK - 1 - k[:, None], m[None, :], M, CHUNK)
        a_re, a_im = load_powers(power_ptr, channel, k[None, :] + 1 - LAG, m[:, None], M, CHUNK)
        out_re = c_re[:, None] * a_re - c_im[:, None] * a_im  # [BLOCK_M, CHUNK]
        out_im = -(c_re[:, None] * a_im + c_im[:, None] * a_re)

    s_re, s_im = load_states(states_ptr, row, length, channel, m, D, M)  # [ROWS, BLOCK_M]
    chunks = ((longest + CHUNK - 1) // CHUNK).to(tl.int32)
    for chunk in range(0, chunks):
        if REVERSE:
            first = length - (chunk + 1) * CHUNK
        else:
            first = tl.zeros([ROWS], tl.int32) + chunk * CHUNK
        x = load_chunk(x_ptr, start, first, length, x_stride_t, CHUNK, WHOLE)  # [ROWS, CHUNK]
        y = product(x, tile, OPERAND)
        y += product(s_re, out_re, OPERAND)
        y += product(s_im, out_im, OPERAND)
        inside = inside_rows(first, length, CHUNK, WHOLE)
        at = y_ptr + ((start + first)[:, None] + k[None, :]) * y_stride_t
        if ONTO:
            y += tl.load(at, mask=inside, other=0.0)
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)
        s_re, s_im = advance(s_re, s_im, re, im, lost_re, lost_im)
        s_re += product(x, into_re, OPERAND)
        s_im += product(x, into_im, OPERAND)

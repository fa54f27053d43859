"""The diagonal scan on tokens as they come, [B T, D]: a program holds WIDE channels, one to a warp.

A channel's tables differ from its neighbour's, so products are batched over channels: [WIDE, ROWS, CHUNK] tokens times
[WIDE, CHUNK, BLOCK_M] tables. Loads take WIDE channels of a token at once and are turned on their way from shared
memory into operands, so that no transposed copy of the tokens is ever made. For bfloat16; WIDE divides D.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.lti.kernels.pieces import row_block
from zoo.ops.semiseparable.kernels.decay import product


@triton.jit
def wide_channels(rows, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """Channels [WIDE] of this program (int64), its first block of rows, the step to the next one, and their number."""
    across: tl.constexpr = D // WIDE
    channel = (tl.program_id(0) % across).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    return channel, tl.program_id(0) // across, tl.num_programs(0) // across, (rows + ROWS - 1) // ROWS


@triton.jit
def wide_rows(
    start_ptr, length_ptr, block, rows, tokens,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What `row_block` says of block number `block`, and its number of chunks."""
    index = tl.zeros([1], tl.int64) + block
    row, start, length, longest = row_block(
        start_ptr, length_ptr, tl.sum(index, axis=0), rows, tokens, ROWS, CHUNK, SEGMENT, PACKED, False
    )
    return row, start, length, ((longest + CHUNK - 1) // CHUNK).to(tl.int32)


@triton.jit
def places(start, first, length, CHUNK: tl.constexpr, FLIP: tl.constexpr):
    """Tokens first .. first + CHUNK - 1 of each row, and which it has: [CHUNK, ROWS, 1] both.

    CHUNK in front: lanes that read one channel of eight rows from shared memory then meet eight times four banks.
    FLIP: the last token comes first.
    """
    k = tl.arange(0, CHUNK)
    if FLIP:
        k = CHUNK - 1 - k
    t = first[None, :] + k[:, None]
    return (start[None, :] + t)[:, :, None], ((t >= 0) & (t < length[None, :]))[:, :, None]


@triton.jit
def load_wide(ptr, stride, token, inside, channel):
    """Tile [WIDE, ROWS, CHUNK] of tokens; zeros outside of rows. ptr: [BT,D] by the stride of tokens."""
    x = tl.load(ptr + token * stride + channel[None, None, :], mask=inside, other=0.0)
    return tl.permute(x, (2, 1, 0))


@triton.jit
def wide_powers(power_ptr, channel, lag, m, M: tl.constexpr, CHUNK: tl.constexpr):
    """e^{lag log_a}, [WIDE, lags, BLOCK_M], real and imaginary parts; zeros beyond M."""
    at = power_ptr + (channel[:, None, None] * 2 * (CHUNK + 1) + lag[None, :, None]) * M + m[None, None, :]
    mask = (m < M)[None, None, :] & (lag >= 0)[None, :, None]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + M * (CHUNK + 1), mask=mask, other=0.0)


@triton.jit
def wide_mode(power_ptr, channel, lag: tl.constexpr, m, M: tl.constexpr, CHUNK: tl.constexpr):
    """e^{lag log_a}, [WIDE, 1, BLOCK_M], real and imaginary parts."""
    at = power_ptr + (channel[:, None] * 2 * (CHUNK + 1) + lag) * M + m[None, :]
    mask = (m < M)[None, :]
    re = tl.load(at, mask=mask, other=0.0)
    im = tl.load(at + M * (CHUNK + 1), mask=mask, other=0.0)
    return re[:, None, :], im[:, None, :]


@triton.jit
def wide_weighted(c_ptr, re, im, channel, m, M: tl.constexpr):
    """Re and -Im of 2 c times the powers [WIDE, lags, BLOCK_M]: what outputs see of states. c_ptr: [D,M,2]."""
    at = c_ptr + (channel[:, None] * M + m[None, :]) * 2
    mask = (m < M)[None, :]
    c_re = 2.0 * tl.load(at, mask=mask, other=0.0).to(tl.float32)[:, None, :]
    c_im = 2.0 * tl.load(at + 1, mask=mask, other=0.0).to(tl.float32)[:, None, :]
    return c_re * re - c_im * im, -(c_re * im + c_im * re)


@triton.jit
def wide_states(ptr, row, length, channel, m, D: tl.constexpr, M: tl.constexpr):
    """Where states [WIDE, ROWS, BLOCK_M] are, the real parts, and which exist. ptr: [rows,2,D,M] float32."""
    at = ptr + row[None, :, None] * (2 * D * M) + channel[:, None, None] * M + m[None, None, :]
    return at, (length > 0)[None, :, None] & (m < M)[None, None, :]


@launched(do_not_specialize=["rows"])
def wide_added_kernel(
    x_ptr, power_ptr, c_ptr,  # [BT,D] by strides; [D,2,CHUNK+1,M] float32, and [D,M,2]
    start_ptr, length_ptr,  # int64 [rows], int32 [rows]
    added_ptr, weighted_ptr,  # [rows,2,D,M] float32
    rows, tokens, x_stride,
    D: tl.constexpr, M: tl.constexpr, LAG: tl.constexpr, REVERSE: tl.constexpr, WEIGHTED: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, OPERAND: tl.constexpr,
    SEGMENT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What `added_kernel` finds, of blocks of ROWS rows of WIDE channels."""
    channel, part, parts, blocks = wide_channels(rows, D, WIDE, ROWS)
    k = tl.arange(0, CHUNK)
    m = tl.arange(0, BLOCK_M)
    re, im = wide_mode(power_ptr, channel, CHUNK, m, M, CHUNK)
    if REVERSE:
        im = -im
        a_re, a_im = wide_powers(power_ptr, channel, k + 1 - LAG, m, M, CHUNK)
        into_re, into_im = wide_weighted(c_ptr, a_re, a_im, channel, m, M)
    else:
        into_re, into_im = wide_powers(power_ptr, channel, CHUNK - 1 - k, m, M, CHUNK)
    if WEIGHTED:
        age = (CHUNK - 1 - k).to(tl.float32)[None, :, None]
        aged_re = (into_re * age).to(OPERAND)
        aged_im = (into_im * age).to(OPERAND)
    into_re = into_re.to(OPERAND)
    into_im = into_im.to(OPERAND)

    for block in range(part, blocks, parts):
        row, start, length, chunks = wide_rows(start_ptr, length_ptr, block, rows, tokens, ROWS, CHUNK, SEGMENT, PACKED)
        s_re = tl.zeros([WIDE, ROWS, BLOCK_M], tl.float32)
        s_im = tl.zeros([WIDE, ROWS, BLOCK_M], tl.float32)
        w_re = tl.zeros([WIDE, ROWS, BLOCK_M], tl.float32)
        w_im = tl.zeros([WIDE, ROWS, BLOCK_M], tl.float32)
        for count in range(0, chunks):
            done = (chunks - 1 - count) * CHUNK
            if REVERSE:
                first = tl.zeros([ROWS], tl.int32) + done
            else:
                first = length - done - CHUNK
            token, inside = places(start, first, length, CHUNK, False)
            x = load_wide(x_ptr, x_stride, token, inside, channel)
            if WEIGHTED:
                moved_re = w_re + CHUNK * s_re
                moved_im = w_im + CHUNK * s_im
                w_re = moved_re * re - moved_im * im + product(x, aged_re, OPERAND)
                w_im = moved_re * im + moved_im * re + product(x, aged_im, OPERAND)
            next_re = s_re * re - s_im * im
            s_im = s_re * im + s_im * re + product(x, into_im, OPERAND)
            s_re = next_re + product(x, into_re, OPERAND)
        at, mask = wide_states(added_ptr, row, length, channel, m, D, M)
        tl.store(at, s_re, mask=mask)
        tl.store(at + D * M, s_im, mask=mask)
        if WEIGHTED:
            at, mask = wide_states(weighted_ptr, row, length, channel, m, D, M)
            tl.store(at, w_re, mask=mask)
            tl.store(at + D * M, w_im, mask=mask)


@launched(do_not_specialize=["rows"])
def wide_mix_kernel(
    x_ptr, power_ptr, c_ptr, taps_ptr,  # [BT,D] by strides; [D,2,CHUNK+1,M] float32, [D,M,2] and [D,CHUNK] float32
    start_ptr, length_ptr, states_ptr,  # int64 [rows], int32 [rows], [rows,2,D,M] float32
    y_ptr,  # [BT,D] by strides; ONTO: of what is in onto_ptr, float32
    onto_ptr, rows, tokens, x_stride, y_stride,
    D: tl.constexpr, M: tl.constexpr, LAG: tl.constexpr, REVERSE: tl.constexpr, ONTO: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, OPERAND: tl.constexpr,
    SEGMENT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What `mix_kernel` makes, for blocks of ROWS rows of WIDE channels. onto_ptr: [BT,D] contiguous."""
    channel, part, parts, blocks = wide_channels(rows, D, WIDE, ROWS)
    k = tl.arange(0, CHUNK)
    m = tl.arange(0, BLOCK_M)
    apart = k[None, :] - k[:, None]  # [j, i]
    if REVERSE:
        apart = -apart
    taps = taps_ptr + channel[:, None, None] * CHUNK + apart[None, :, :]
    tile = tl.load(taps, mask=(apart >= 0)[None, :, :], other=0.0).to(OPERAND)
    re, im = wide_mode(power_ptr, channel, CHUNK, m, M, CHUNK)
    near_re, near_im = wide_powers(power_ptr, channel, CHUNK - 1 - k, m, M, CHUNK)
    a_re, a_im = wide_powers(power_ptr, channel, k + 1 - LAG, m, M, CHUNK)
    far_re, far_im = wide_weighted(c_ptr, a_re, a_im, channel, m, M)
    if REVERSE:
        im = -im
        into_re, into_im, out_re, out_im = far_re, far_im, near_re, near_im
    else:
        into_re, into_im, out_re, out_im = near_re, near_im, far_re, far_im
    into_re = into_re.to(OPERAND)
    into_im = into_im.to(OPERAND)
    out_re = tl.permute(out_re.to(OPERAND), (0, 2, 1))  # [WIDE, BLOCK_M, CHUNK]
    out_im = tl.permute(out_im.to(OPERAND), (0, 2, 1))

    for block in range(part, blocks, parts):
        row, start, length, chunks = wide_rows(start_ptr, length_ptr, block, rows, tokens, ROWS, CHUNK, SEGMENT, PACKED)
        at, mask = wide_states(states_ptr, row, length, channel, m, D, M)
        s_re = tl.load(at, mask=mask, other=0.0)
        s_im = tl.load(at + D * M, mask=mask, other=0.0)
        for chunk in range(0, chunks):
            if REVERSE:
                first = length - (chunk + 1) * CHUNK
            else:
                first = tl.zeros([ROWS], tl.int32) + chunk * CHUNK
            token, inside = places(start, first, length, CHUNK, False)
            x = load_wide(x_ptr, x_stride, token, inside, channel)
            y = product(x, tile, OPERAND)
            y += product(s_re, out_re, OPERAND)
            y += product(s_im, out_im, OPERAND)
            if ONTO:
                onto = tl.load(onto_ptr + token * D + channel[None, None, :], mask=inside, other=0.0)
                y += tl.permute(onto, (2, 1, 0))
            turned = tl.permute(y.to(y_ptr.dtype.element_ty), (2, 1, 0))
            tl.store(y_ptr + token * y_stride + channel[None, None, :], turned, mask=inside)
            next_re = s_re * re - s_im * im
            s_im = s_re * im + s_im * re + product(x, into_im, OPERAND)
            s_re = next_re + product(x, into_re, OPERAND)

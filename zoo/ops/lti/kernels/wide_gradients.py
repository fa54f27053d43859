"""Gradients of what all sequences share, on tokens as they come: see gradients.py and wide.py."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.lti.kernels.pieces import row_extent
from zoo.ops.lti.kernels.wide import wide_channels, wide_mode, wide_powers, wide_rows, wide_states
from zoo.ops.semiseparable.kernels.decay import product


@triton.jit
def crossed_rows(
    start_ptr, length_ptr, block, rows, tokens, ROWS: tl.constexpr, SEGMENT: tl.constexpr, PACKED: tl.constexpr
):
    """First tokens and lengths of rows r = 8 a + b + 2 d of a block, [1, 1, a, b, 1, d], as `load_crossed` wants."""
    a = tl.arange(0, ROWS // 8)[None, None, :, None, None, None]
    b = tl.arange(0, 2)[None, None, None, :, None, None]
    d = tl.arange(0, 4)[None, None, None, None, None, :]
    return row_extent(start_ptr, length_ptr, block * ROWS + 8 * a + b + 2 * d, rows, tokens, SEGMENT, PACKED)


@triton.jit
def load_crossed(
    ptr, stride, start, length, first, channel, ROWS: tl.constexpr, CHUNK: tl.constexpr, FLIP: tl.constexpr
):
    """Tile [WIDE, ROWS, CHUNK] from token `first` of each row on; zeros outside of rows. FLIP: the last one first.

    Such a tile is an operand both as it is and turned: then neighbouring lanes read neighbouring rows, or neighbouring
    tokens, sixteen bytes apart. In shared memory two bits of the row and one of the token (k = 4 h + low + 2 c) are the
    lowest of the address, so that either reading meets every bank equally often.
    """
    h = tl.arange(0, CHUNK // 4)[:, None, None, None, None, None]
    low = tl.arange(0, 2)[None, :, None, None, None, None]
    c = tl.arange(0, 2)[None, None, None, None, :, None]
    k = 4 * h + low + 2 * c
    if FLIP:
        k = CHUNK - 1 - k
    t = first + k  # [h, low, 1, 1, c, 1]
    at = ((start + t) * stride)[:, :, :, :, :, :, None] + channel[None, None, None, None, None, None, :]
    x = tl.load(ptr + at, mask=(t < length)[:, :, :, :, :, :, None], other=0.0)
    return tl.reshape(tl.permute(x, (6, 2, 5, 3, 0, 4, 1)), [channel.shape[0], ROWS, CHUNK])


@triton.jit
def halves(x):
    """The first and the second half of the rows of x [WIDE, ROWS, BLOCK_M]: a lane holds both of a pair."""
    parts = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2, x.shape[2]])
    return tl.split(tl.permute(parts, (0, 2, 3, 1)))


@triton.jit
def add_products(sum_re, sum_im, a_re, a_im, b_re, b_im):
    """Sums [WIDE, ROWS / 2, BLOCK_M] plus the complex products a b [WIDE, ROWS, BLOCK_M] of both halves."""
    one_a_re, two_a_re = halves(a_re)
    one_a_im, two_a_im = halves(a_im)
    one_b_re, two_b_re = halves(b_re)
    one_b_im, two_b_im = halves(b_im)
    sum_re += one_a_re * one_b_re
    sum_re -= one_a_im * one_b_im
    sum_re += two_a_re * two_b_re
    sum_re -= two_a_im * two_b_im
    sum_im += one_a_re * one_b_im
    sum_im += one_a_im * one_b_re
    sum_im += two_a_re * two_b_im
    sum_im += two_a_im * two_b_re
    return sum_re, sum_im


@launched(do_not_specialize=["rows"])
def wide_gradient_kernel(
    x_ptr, dy_ptr, power_ptr,  # [BT,D] by strides, twice; [D,2,CHUNK+1,M] float32
    start_ptr, length_ptr,  # int64 [rows], int32 [rows]
    states_ptr, slopes_ptr,  # [rows,2,D,M] float32: the state before each row, and its derivative in log_a
    dtaps_ptr, sums_ptr,  # [parts,D,CHUNK] and [parts,4,D,M] float32
    rows, tokens, x_stride, dy_stride,
    D: tl.constexpr, M: tl.constexpr, LAG: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, OPERAND: tl.constexpr,
    SEGMENT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What `shared_gradient_kernel` finds, of blocks of ROWS rows of WIDE channels.

    The tokens of dy come in the other order, k = CHUNK - 1 - i, so that e^{l_i log_a} = e^{(1-LAG) log_a} into_k: one
    table serves states and gradients, and the factor comes in at the end. Sums over rows are taken there, too.
    """
    channel, part, parts, blocks = wide_channels(rows, D, WIDE, ROWS)
    k = tl.arange(0, CHUNK)
    m = tl.arange(0, BLOCK_M)
    re, im = wide_mode(power_ptr, channel, CHUNK, m, M, CHUNK)
    into_re, into_im = wide_powers(power_ptr, channel, CHUNK - 1 - k, m, M, CHUNK)
    age = (CHUNK - 1 - k).to(tl.float32)[None, :, None]
    aged_re = (into_re * age).to(OPERAND)
    aged_im = (into_im * age).to(OPERAND)
    into_re = into_re.to(OPERAND)
    into_im = into_im.to(OPERAND)

    c_re = tl.zeros([WIDE, ROWS // 2, BLOCK_M], tl.float32)
    c_im = tl.zeros([WIDE, ROWS // 2, BLOCK_M], tl.float32)
    a_re = tl.zeros([WIDE, ROWS // 2, BLOCK_M], tl.float32)
    a_im = tl.zeros([WIDE, ROWS // 2, BLOCK_M], tl.float32)
    pairs = tl.zeros([WIDE, CHUNK, CHUNK], tl.float32)  # [CHUNK - 1 - i, j]
    for block in range(part, blocks, parts):
        row, _, length, chunks = wide_rows(start_ptr, length_ptr, block, rows, tokens, ROWS, CHUNK, SEGMENT, PACKED)
        at, mask = wide_states(states_ptr, row, length, channel, m, D, M)
        s_re = tl.load(at, mask=mask, other=0.0)
        s_im = tl.load(at + D * M, mask=mask, other=0.0)
        at, mask = wide_states(slopes_ptr, row, length, channel, m, D, M)
        w_re = tl.load(at, mask=mask, other=0.0)
        w_im = tl.load(at + D * M, mask=mask, other=0.0)
        begin, span = crossed_rows(start_ptr, length_ptr, block, rows, tokens, ROWS, SEGMENT, PACKED)
        for chunk in range(0, chunks):
            x = load_crossed(x_ptr, x_stride, begin, span, chunk * CHUNK, channel, ROWS, CHUNK, False)
            dy = load_crossed(dy_ptr, dy_stride, begin, span, chunk * CHUNK, channel, ROWS, CHUNK, True)
            pairs += product(tl.permute(dy, (0, 2, 1)), x, OPERAND)
            u_re = product(dy, into_re, OPERAND)
            u_im = product(dy, into_im, OPERAND)
            c_re, c_im = add_products(c_re, c_im, u_re, u_im, s_re, s_im)
            a_re, a_im = add_products(a_re, a_im, u_re, u_im, w_re, w_im)
            v_re = product(dy, aged_re, OPERAND)
            v_im = product(dy, aged_im, OPERAND)
            a_re, a_im = add_products(a_re, a_im, v_re, v_im, s_re, s_im)
            moved_re = w_re + CHUNK * s_re
            moved_im = w_im + CHUNK * s_im
            w_re = moved_re * re - moved_im * im + product(x, aged_re, OPERAND)
            w_im = moved_re * im + moved_im * re + product(x, aged_im, OPERAND)
            next_re = s_re * re - s_im * im
            s_im = s_re * im + s_im * re + product(x, into_im, OPERAND)
            s_re = next_re + product(x, into_re, OPERAND)

    a_re += (1 - LAG) * c_re  # l_i = age_k + 1 - LAG
    a_im += (1 - LAG) * c_im
    one_re, one_im = wide_mode(power_ptr, channel, 1 - LAG, m, M, CHUNK)
    sums = sums_ptr + (part * 4 * D + channel[:, None]) * M + m[None, :]
    in_modes = tl.broadcast_to((m < M)[None, :], [WIDE, BLOCK_M])
    tl.store(sums, tl.sum(c_re * one_re - c_im * one_im, axis=1), mask=in_modes)
    tl.store(sums + D * M, tl.sum(c_re * one_im + c_im * one_re, axis=1), mask=in_modes)
    tl.store(sums + 2 * D * M, tl.sum(a_re * one_re - a_im * one_im, axis=1), mask=in_modes)
    tl.store(sums + 3 * D * M, tl.sum(a_re * one_im + a_im * one_re, axis=1), mask=in_modes)
    met = CHUNK - 1 - k[:, None] - k[None, :]  # [CHUNK - 1 - i, e] -> j = i - e
    index = tl.broadcast_to(((met + CHUNK) % CHUNK)[None, :, :], [WIDE, CHUNK, CHUNK])
    turned = tl.where((met >= 0)[None, :, :], tl.gather(pairs, index, 2), 0.0)
    at = dtaps_ptr + (part * D + channel[:, None]) * CHUNK + k[None, :]
    tl.store(at, tl.sum(turned, axis=1))

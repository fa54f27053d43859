"""Jitted pieces of the kernels of the diagonal scan: rows of tokens, tables of powers, the step of a state.

A row is a run of at most SEGMENT tokens of one sequence; a program holds ROWS of them for one channel, so that one
matrix product serves ROWS chunks. Rows may lie in any sequence: the tables of a channel know none.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_extent(start_ptr, length_ptr, row, rows, tokens, SEGMENT: tl.constexpr, PACKED: tl.constexpr):
    """First tokens (int64) and lengths (int32) of rows whose numbers (int64) come in any shape; 0 beyond the last row.

    Rows of sequences of `tokens` tokens each follow from their numbers; PACKED: they are looked up.
    """
    if PACKED:
        start = tl.load(start_ptr + row, mask=row < rows, other=0)
        length = tl.load(length_ptr + row, mask=row < rows, other=0)
    else:
        per = (tokens + SEGMENT - 1) // SEGMENT
        begin = (row % per) * SEGMENT
        start = (row // per) * tokens + begin
        length = tl.where(row < rows, tl.minimum(tokens - begin, SEGMENT), 0).to(tl.int32)
    return start, length


@triton.jit
def row_block(
    start_ptr, length_ptr, block, rows, tokens,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Row numbers (int64), their first tokens (int64), their lengths (0 beyond the last row) and the longest.

    WHOLE: every sequence is made of whole chunks, which the compiler must know to load and store several tokens at a
    time.
    """
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start, length = row_extent(start_ptr, length_ptr, row, rows, tokens, SEGMENT, PACKED)
    if WHOLE:
        start = tl.multiple_of(start, CHUNK)
        length = tl.multiple_of(length, CHUNK)
    return row, start, length, tl.max(length, axis=0)


@triton.jit
def inside_rows(first, length, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """Which of the tokens first .. first + CHUNK - 1 of each row it has: [ROWS, CHUNK]. first, length: int32 [ROWS]."""
    k = tl.arange(0, CHUNK)
    if WHOLE:
        has = (first >= 0) & (first < length)
        inside = tl.broadcast_to(has[:, None], [first.shape[0], CHUNK])
    else:
        t = first[:, None] + k[None, :]
        inside = (t >= 0) & (t < length[:, None])
    return inside


@triton.jit
def load_chunk(ptr, start, first, length, stride_t, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """Tile [ROWS, CHUNK] of one channel from token `first` [ROWS] of each row on; zeros outside of the row."""
    at = (start + first)[:, None] + tl.arange(0, CHUNK)[None, :]
    return tl.load(ptr + at * stride_t, mask=inside_rows(first, length, CHUNK, WHOLE), other=0.0)


@triton.jit
def load_powers(power_ptr, channel, lag, m, M: tl.constexpr, CHUNK: tl.constexpr):
    """e^{lag log_a} for lags and modes that broadcast to a tile: real and imaginary parts, zeros beyond M.

    power_ptr: [D,2,CHUNK+1,M] float32: modes side by side, as programs read them.
    """
    at = power_ptr + (channel * 2 * (CHUNK + 1) + lag) * M + m
    mask = (m < M) & (lag >= 0)
    return tl.load(at, mask=mask, other=0.0), tl.load(at + M * (CHUNK + 1), mask=mask, other=0.0)


@triton.jit
def load_weights(c_ptr, channel, m, M: tl.constexpr):
    """2 c of the modes, real and imaginary parts in float32. c_ptr: [D,M,2]."""
    at = c_ptr + (channel * M + m) * 2
    re = tl.load(at, mask=m < M, other=0.0).to(tl.float32)
    return 2.0 * re, 2.0 * tl.load(at + 1, mask=m < M, other=0.0).to(tl.float32)


@triton.jit
def load_tile(taps_ptr, channel, CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """Toeplitz tile [j, i] = taps at lag i - j, or j - i if REVERSE; 0 where that is negative. taps_ptr: [D,CHUNK]."""
    step = tl.arange(0, CHUNK)
    if REVERSE:
        lag = step[:, None] - step[None, :]
    else:
        lag = step[None, :] - step[:, None]
    return tl.load(taps_ptr + channel * CHUNK + lag, mask=lag >= 0, other=0.0)


@triton.jit
def load_step(step_ptr, channel, m, M: tl.constexpr, REVERSE: tl.constexpr):
    """e^{CHUNK log_a} as four rows [1, BLOCK_M]: real and imaginary parts, and what rounding took from each.

    Multiplying by the rounded number alone would add up its error over the chunks. Conjugated if REVERSE: the
    gradient of a product is one with the conjugate. step_ptr: [D,4,M] float32.
    """
    at = step_ptr + channel * 4 * M + m
    mask = m < M
    re = tl.load(at, mask=mask, other=0.0)
    im = tl.load(at + M, mask=mask, other=0.0)
    lost_re = tl.load(at + 2 * M, mask=mask, other=0.0)
    lost_im = tl.load(at + 3 * M, mask=mask, other=0.0)
    if REVERSE:
        im = -im
        lost_im = -lost_im
    return re[None, :], im[None, :], lost_re[None, :], lost_im[None, :]


@triton.jit
def advance(s_re, s_im, re, im, lost_re, lost_im):
    """The state [ROWS, BLOCK_M] after a chunk without input."""
    next_re = (s_re * re - s_im * im) + (s_re * lost_re - s_im * lost_im)
    next_im = (s_re * im + s_im * re) + (s_re * lost_im + s_im * lost_re)
    return next_re, next_im


@triton.jit
def load_states(ptr, row, length, channel, m, D: tl.constexpr, M: tl.constexpr):
    """States [ROWS, BLOCK_M] of one channel, real and imaginary parts; zeros for rows without a token.

    ptr: [rows,2,D,M] float32.
    """
    at = ptr + row[:, None] * (2 * D * M) + channel * M + m[None, :]
    mask = (length > 0)[:, None] & (m < M)[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + D * M, mask=mask, other=0.0)


@triton.jit
def store_states(ptr, row, length, channel, m, re, im, D: tl.constexpr, M: tl.constexpr):
    """The other way; rows without a token are left alone."""
    at = ptr + row[:, None] * (2 * D * M) + channel * M + m[None, :]
    mask = (length > 0)[:, None] & (m < M)[None, :]
    tl.store(at, re, mask=mask)
    tl.store(at + D * M, im, mask=mask)

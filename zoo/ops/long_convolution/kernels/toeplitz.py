"""The long convolution as a product with Toeplitz tiles, tokens last, and the gradient of its taps."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.diagonals import diagonal_sums
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import add_product
from zoo.ops.semiseparable.kernels.decay import product


@triton.jit
def _chunk_rows(start_ptr, begin_ptr, end_ptr, row, rows):
    """First tokens of rows of CHUNK tokens, and begin and end of the sequences they lie in; empty beyond the last."""
    start = tl.load(start_ptr + row, mask=row < rows, other=0)
    begin = tl.load(begin_ptr + row, mask=row < rows, other=0)
    end = tl.load(end_ptr + row, mask=row < rows, other=0)
    return start, begin, end


@triton.jit
def _load_rows(ptr, first, step, begin, end):
    """Tile [ROWS, CHUNK] from tokens `first` [ROWS] on; zeros outside of the sequence."""
    t = first[:, None] + step[None, :]
    return tl.load(ptr + t, mask=(t >= begin[:, None]) & (t < end[:, None]), other=0.0)


@launched(do_not_specialize=["rows", "taps", "ahead"])
def toeplitz_kernel(
    u_ptr, taps_ptr, y_ptr,  # [D,BT], [D,W] float32, [D,BT], contiguous
    start_ptr, begin_ptr, end_ptr,  # int64 [rows]: first token of a row; begin and end of its sequence
    rows, taps, ahead, tokens,
    D: tl.constexpr, MIRROR: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS rows of CHUNK tokens of one channel: y_i = sum_w taps_w u_{i - w + ahead}.

    W = taps, of which `ahead` look ahead. MIRROR: the taps are read backwards, which makes this the gradient of u.
    """
    channel = (tl.program_id(0) % D).to(tl.int64)
    row = (tl.program_id(0) // D).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start, begin, end = _chunk_rows(start_ptr, begin_ptr, end_ptr, row, rows)
    step = tl.arange(0, CHUNK)
    u_ptr += channel * tokens
    taps_ptr += channel * taps
    furthest = taps - 1 - ahead
    if MIRROR:
        furthest = ahead
        ahead = taps - 1 - ahead
    before = tl.max(start - begin, axis=0).to(tl.int32)  # tokens that any row has before it, and from its start on
    after = tl.max(end - start, axis=0).to(tl.int32)
    first = -tl.minimum((ahead + CHUNK - 1) // CHUNK, tl.maximum(after - 1, 0) // CHUNK)
    last = tl.minimum((furthest + CHUNK - 1) // CHUNK, (before + CHUNK - 1) // CHUNK)
    y = tl.zeros([ROWS, CHUNK], tl.float32)
    for apart in range(first, last + 1):
        index = apart * CHUNK + step[None, :] - step[:, None] + ahead  # [j, i]
        inside = (index >= 0) & (index < taps)
        if MIRROR:
            index = taps - 1 - index
        tile = tl.load(taps_ptr + index, mask=inside, other=0.0)
        u = _load_rows(u_ptr, start - apart * CHUNK, step, begin, end)  # [ROWS, CHUNK]
        y += product(u, tile, OPERAND)
    t = start[:, None] + step[None, :]
    tl.store(y_ptr + channel * tokens + t, y.to(y_ptr.dtype.element_ty), mask=t < end[:, None])


@launched(do_not_specialize=["rows", "first"])
def tap_gradient_kernel(
    u_ptr, dy_ptr, start_ptr, begin_ptr, end_ptr,  # [D,BT] contiguous, twice; int64 [rows]
    sums_ptr,  # [apart,2,D,CHUNK] float32
    rows, first, tokens,
    D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program owns the pairs of chunks `first` + its number apart, of one channel, over all rows.

    Sums dy_i u_j by lag: [0] lags apart CHUNK + e, [1] lags (apart - 1) CHUNK + e, for e = 0 .. CHUNK - 1.
    """
    channel = (tl.program_id(0) % D).to(tl.int64)
    number = (tl.program_id(0) // D).to(tl.int64)
    back = (first + number) * CHUNK
    step = tl.arange(0, CHUNK)
    u_ptr += channel * tokens
    dy_ptr += channel * tokens
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)  # [i, j]
    lost = tl.zeros([CHUNK, CHUNK], tl.float32)
    row = tl.arange(0, ROWS).to(tl.int64)
    for _ in range(0, (rows + ROWS - 1) // ROWS):
        start, begin, end = _chunk_rows(start_ptr, begin_ptr, end_ptr, row, rows)
        dy = _load_rows(dy_ptr, start, step, begin, end)  # [ROWS, CHUNK]
        u = _load_rows(u_ptr, start - back, step, begin, end)
        pairs, lost = add_product(pairs, lost, tl.trans(dy), u)
        row += ROWS
    same, earlier = diagonal_sums(pairs, CHUNK)
    at = sums_ptr + (number * 2 * D + channel) * CHUNK + step
    tl.store(at, same)
    tl.store(at + D * CHUNK, earlier)

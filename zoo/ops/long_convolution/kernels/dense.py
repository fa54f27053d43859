"""The long convolution of unpacked rows in bfloat16: Toeplitz tiles read as vectors, every product on tensor cores.

A tile [j, i] holds the tap at lag `shift + i - j`: each row of it begins one tap before the row above, so that no two
neighbours are aligned alike. COPIES copies of the taps, each one tap later than the one before, make every row an
aligned run of vectors of COPIES taps, which goes to shared memory like the tile of any product.
"""

from __future__ import annotations

import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import dot


@launched(do_not_specialize=["taps", "origin"])
def copies_kernel(
    taps_ptr, out_ptr,  # [D,W] float32; [D,COPIES,length] bfloat16
    taps, length, origin,
    MIRROR: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK places of one channel: out[s,p] = taps[p - s + origin], 0 where there is no such tap.

    MIRROR: the taps are read backwards.
    """
    across = (length + BLOCK - 1) // BLOCK
    channel = (tl.program_id(0) // across).to(tl.int64)
    place = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    copy = tl.arange(0, COPIES)
    index = place[None, :] - copy[:, None] + origin
    inside = (index >= 0) & (index < taps)
    if MIRROR:
        index = taps - 1 - index
    value = tl.load(taps_ptr + channel * taps + index, mask=inside, other=0.0)
    at = out_ptr + channel * COPIES * length + copy[:, None] * length + place[None, :]
    tl.store(at, value.to(out_ptr.dtype.element_ty), mask=(place < length)[None, :])


@launched(do_not_specialize=["B", "rows", "first", "last", "nothing"])
def dense_kernel(
    u_ptr, copies_ptr, y_ptr,  # [D,B,T], [D,COPIES,length], [D,B,T]
    T, B, rows, length, first, last, nothing,
    COPIES: tl.constexpr, VECTOR: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS of the rows (chunk, sequence) of CHUNK tokens of one channel, chunk by chunk.

    Vectors of 16 bytes come from L2, those of 8 (COPIES or VECTOR = 4) through L1, where tiles that overlap share
    what they read. `nothing` is 0: times VECTOR it keeps the compiler from reading u in longer vectors.

    y[row, i] = sum over s = first .. last of u[STEP tokens from STEP s before the row] times the tile at lag STEP s.
    """
    across = (rows + ROWS - 1) // ROWS
    channel = (tl.program_id(0) // across).to(tl.int64)
    begin = (across - 1 - tl.program_id(0) % across) * ROWS  # those with most behind them first
    row = begin + tl.arange(0, ROWS)
    start = row // B * CHUNK
    here = row % B * T + start
    from_here = here + nothing * VECTOR
    i = tl.arange(0, CHUNK)
    j = tl.arange(0, STEP)
    u_ptr += channel * B * T
    copies_ptr += channel * COPIES * length
    tile_at = j % COPIES * length - j // COPIES * COPIES + (STEP - COPIES)  # [j]
    latest = tl.minimum(begin + ROWS, rows) - 1
    low = tl.maximum(first, -((T - 1 - begin // B * CHUNK) // STEP))
    high = tl.minimum(last, (latest // B * CHUNK + STEP - 1) // STEP)
    y = tl.zeros([ROWS, CHUNK], tl.float32)
    for shift in range(low, high + 1):
        t = start[:, None] - shift * STEP + j[None, :]
        inside = (start - shift * STEP >= 0)[:, None] & (t < T) & (row < rows)[:, None]
        if CHUNK % STEP != 0:
            inside = (t >= 0) & (t < T) & (row < rows)[:, None]
        u = tl.load(u_ptr + from_here[:, None] - shift * STEP + j[None, :], mask=inside, other=0.0)  # [ROWS, STEP]
        tile = tl.load(copies_ptr + tile_at[:, None] + (shift - first) * STEP + i[None, :])  # [STEP, CHUNK]
        y = dot(u, tile, y)
    kept = (start[:, None] + i[None, :] < T) & (row < rows)[:, None]
    tl.store(y_ptr + channel * B * T + here[:, None] + i[None, :], y.to(y_ptr.dtype.element_ty), mask=kept)

"""The gradient of the taps for unpacked rows in bfloat16: products of chunks, summed over their diagonals."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import dot

LANES = tl.constexpr(32)  # tokens of a block of pairs: as many as a warp has threads, so that a turn is one shuffle


@triton.jit
def block_sums(pairs, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Sums over diagonals of every block [32,32] of pairs [CHUNK,WIDTH]: over i - j = e and over i - j = e - 32.

    Returns two [CHUNK/32,WIDTH/32,32]; the last axis is e = 0 .. 31.
    """
    blocks = tl.reshape(pairs, [CHUNK // LANES, LANES, WIDTH // LANES, LANES])
    i = tl.arange(0, LANES)[None, :, None, None]
    e = tl.arange(0, LANES)[None, None, None, :]
    source = tl.broadcast_to((i - e + LANES) % LANES, blocks.shape)
    turned = tl.gather(blocks, source, 3)  # blocks[i, i - e], around the end
    same = tl.sum(tl.where(i >= e, turned, 0.0), axis=1)
    return same, tl.sum(tl.where(i >= e, 0.0, turned), axis=1)


@launched(do_not_specialize=["B", "D", "first", "nothing"])
def dense_gradient_kernel(
    u_ptr, dy_ptr, sums_ptr,  # [D,B,T], [D,B,T]; [CHUNK/32,2,D,groups,WIDTH] float32
    T, B, D, first, nothing,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """One program owns WIDTH / CHUNK differences of chunks from `first` + its number of them, of one channel.

    Multiplies the dy of each row (chunk, sequence) by WIDTH tokens of u, and sums dy_i u_j by lag in blocks of 32.
    The rows of a product are ROWS / TOGETHER chunks of TOGETHER sequences.
    VECTOR, nothing: as in `dense_kernel`; the tokens of u of neighbouring chunks overlap.
    """
    groups = tl.num_programs(0) // D
    channel = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups  # those with most rows first
    nearest = first + group * (WIDTH // CHUNK)
    back = (nearest + WIDTH // CHUNK - 1) * CHUNK
    chunks = (T + CHUNK - 1) // CHUNK
    low = tl.maximum(nearest, 0) * CHUNK  # tokens that have a partner
    high = tl.minimum(chunks, chunks + nearest + WIDTH // CHUNK - 1) * CHUNK
    row = tl.arange(0, ROWS)
    sequence = row % TOGETHER
    later = row // TOGETHER * CHUNK
    dy_t = later[:, None] + tl.arange(0, CHUNK)[None, :]
    u_t = (later - back)[:, None] + tl.arange(0, WIDTH)[None, :]
    u_at = (sequence * T + nothing * VECTOR)[:, None] + u_t
    dy_at = (sequence * T)[:, None] + dy_t
    u_ptr += channel * B * T
    dy_ptr += channel * B * T
    span: tl.constexpr = ROWS // TOGETHER * CHUNK
    pairs = tl.zeros([CHUNK, WIDTH], tl.float32)
    begin = 0  # the first sequence and the first token of a product
    start = low
    for _ in range((high - low + span - 1) // span * ((B + TOGETHER - 1) // TOGETHER)):
        real = (sequence < B - begin) & (later < high - start)
        here = begin * T + start
        dy_mask = real[:, None] & (dy_t < T - start)
        u_mask = real[:, None] & (u_t >= -start) & (u_t < T - start)
        dy = tl.load(dy_ptr + here + dy_at, mask=dy_mask, other=0.0)  # [ROWS, CHUNK]
        u = tl.load(u_ptr + here + u_at, mask=u_mask, other=0.0)  # [ROWS, WIDTH]
        pairs = dot(tl.trans(dy), u, pairs)
        start += span
        begin = tl.where(start >= high, begin + TOGETHER, begin)
        start = tl.where(start >= high, low, start)
    same, earlier = block_sums(pairs, CHUNK, WIDTH)
    block = tl.arange(0, CHUNK // LANES)[:, None, None]
    place = WIDTH - LANES - tl.arange(0, WIDTH // LANES)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]
    at = sums_ptr + ((block * 2 * D + channel) * groups + group) * WIDTH + place
    tl.store(at, same)
    tl.store(at + D * groups.to(tl.int64) * WIDTH, earlier)


@launched(do_not_specialize=["taps", "D", "begin"])
def join_kernel(
    sums_ptr, out_ptr,  # [CHUNK/32,2,D,lags] float32, [D,W] float32
    taps, lags, D, begin,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[d,w]: the sums of the lag w + begin after the first one of sums[0,0]; sums[c,s] begin 32 (c - s) later."""
    across = (taps + BLOCK - 1) // BLOCK
    channel = (tl.program_id(0) // across).to(tl.int64)
    w = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(CHUNK // LANES * 2):
        place = w + begin - LANES * (part // 2 - part % 2)
        real = (w < taps) & (place >= 0) & (place < lags)
        total += tl.load(sums_ptr + (part * D + channel) * lags + place, mask=real, other=0.0)
    tl.store(out_ptr + channel * taps + w, total, mask=w < taps)

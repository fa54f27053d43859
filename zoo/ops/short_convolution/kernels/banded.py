"""Short convolution of many taps on tensor cores, on tokens as they come, [B,T,D] in half precision.

In chunks of CHUNK tokens, y_c = sum_s x_{c-s} tile_s with tile_s[j,i] = the tap at lag CHUNK s + i - j. A program walks
along ROWS spans of tokens at once, so that a product of a channel has ROWS chunks; what a chunk gives to those after it
waits in accumulators, so that every token is loaded once, and those of SHIFTS - 1 chunks before a span again. The
gradient of x is the same walk backwards, with transposed tiles.

Channels lie side by side and each has tiles of its own: products are batched over WIDE channels, of which a warp has
HELD neighbours, so that it reads HELD numbers of a token at once when it turns them into operands.
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import dot

CHUNK = tl.constexpr(16)  # tokens: as many as a product of tensor cores takes


@triton.jit
def channels_of(D, WIDE: tl.constexpr, HELD: tl.constexpr):
    """The first channel of this program (int64), its channels in the order of products [WIDE]; its part, and of how
    many."""
    across = D // WIDE
    lowest = (tl.program_id(0) % across).to(tl.int64) * WIDE
    c = tl.arange(0, WIDE)
    WARPS: tl.constexpr = WIDE // HELD
    return lowest, lowest + c % WARPS * HELD + c // WARPS, tl.program_id(0) // across, tl.num_programs(0) // across


@triton.jit
def pairs_of_rows(ROWS: tl.constexpr):
    """Number of the span and of the token of each place of a tile, [CHUNK ROWS] both.

    Two spans lie beside each other, then the tokens. Threads that copy neighbouring places to shared memory, and the
    lanes that read a left operand (eight spans, every fourth token), both meet every bank equally often.
    """
    place = tl.arange(0, CHUNK * ROWS)
    return place // (2 * CHUNK) * 2 + place % 2, place // 2 % CHUNK


@triton.jit
def spans_of(
    start_ptr, before_ptr, rest_ptr, owner_ptr, row, rows, T, SPAN: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Spans of at most SPAN tokens by their numbers (int64, any shape): sequence and first token (int64), tokens of the
    sequence before it, and from it on (int32; 0 beyond the last span)."""
    if PACKED:
        owner = tl.load(owner_ptr + row, mask=row < rows, other=0)
        start = tl.load(start_ptr + row, mask=row < rows, other=0)
        before = tl.load(before_ptr + row, mask=row < rows, other=0)
        rest = tl.load(rest_ptr + row, mask=row < rows, other=0)
    else:
        per = (T + SPAN - 1) // SPAN
        owner = row // per
        start = row % per * SPAN
        before = start.to(tl.int32)
        rest = tl.where(row < rows, T - before, 0).to(tl.int32)
    return owner, start, tl.where(rest > 0, before, 0), rest


@triton.jit
def tile_at(ptr, at, lowest, inside, WIDE: tl.constexpr):
    """WIDE channels from `lowest` on of the tokens at offsets `at`, as they lie: [WIDE/8,places,8]; 0 if not inside.

    Eight channels are sixteen bytes; the rest of a token comes first, so that lanes beside each other load it whole.
    """
    eights = tl.arange(0, WIDE // 8)[:, None, None] * 8 + tl.arange(0, 8)[None, None, :]
    return tl.load(ptr + at[None, :, None] + (lowest + eights), mask=inside[None, :, None], other=0.0)


@triton.jit
def store_tile(ptr, at, lowest, tile, inside, WIDE: tl.constexpr):
    """Store what is laid out as `tile_at` does."""
    eights = tl.arange(0, WIDE // 8)[:, None, None] * 8 + tl.arange(0, 8)[None, None, :]
    tl.store(ptr + at[None, :, None] + (lowest + eights), tile.to(ptr.dtype.element_ty), mask=inside[None, :, None])


@triton.jit
def load_edge(ptr, owner, entry, lowest, rest, D, W: tl.constexpr, WIDE: tl.constexpr):
    """Of [S,W-1,D] the given entries, laid out as `tile_at` does; 0 beyond either end, and for spans without tokens."""
    inside = (entry >= 0) & (entry < W - 1) & (rest > 0)
    return tile_at(ptr, (owner * (W - 1) + entry) * D, lowest, inside, WIDE)


@triton.jit
def turned(x, ROWS: tl.constexpr, WIDE: tl.constexpr, HELD: tl.constexpr):
    """Places of `pairs_of_rows`, [WIDE/8,places,8] -> [WIDE,ROWS,CHUNK] in the order of products.

    Tokens come as 0 4 1 5 2 6 3 7 and the same from 8 on: see `token_at`.
    """
    x = tl.reshape(x, [WIDE // 8, ROWS // 2, 2, 2, 4, 2, 8 // HELD, HELD])  # eights, spans, tokens (3), spans, channels
    return tl.reshape(tl.permute(x, (7, 0, 6, 1, 5, 2, 4, 3)), [WIDE, ROWS, CHUNK])


@triton.jit
def token_at(k):
    """The token of a chunk that `turned` puts at place k."""
    return k // 8 * 8 + k % 2 * 4 + k // 2 % 4


@triton.jit
def turned_back(y, ROWS: tl.constexpr, WIDE: tl.constexpr, HELD: tl.constexpr):
    """[WIDE,ROWS,CHUNK], tokens in their order, -> [WIDE/8,places,8], as tiles lie."""
    y = tl.reshape(y, [HELD, WIDE // 8, 8 // HELD, ROWS // 2, 2, CHUNK])
    return tl.reshape(tl.permute(y, (1, 3, 5, 4, 2, 0)), [WIDE // 8, ROWS * CHUNK, 8])


@triton.jit
def scale_of(weight_ptr, channel, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """Power of 2 by which taps are divided before they are rounded to float16, [WIDE,1,1]: the largest is 1 to 2."""
    w = tl.arange(0, BLOCK_W)
    taps = tl.load(weight_ptr + channel[:, None] * W + w[None, :], mask=(w < W)[None, :], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(taps), axis=1)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((power > 1e-37) & (power < 1e37), power, 1.0)[:, None, None]


@triton.jit
def tile_of(
    weight_ptr, channel, unit, shift: tl.constexpr,
    W: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Taps at lags CHUNK shift + i - token_at(j) as [WIDE,j,i], float32; i and token_at(j) change places if REVERSE.

    weight_ptr: [D,W], lag 0 last. They are loaded in axes of which the first two belong to lanes, the third to warps
    and the rest to registers: just so lie right operands of products, and tiles stay in registers. unit: 1, unknown to
    the compiler, which would take another order if it saw that taps of neighbouring i or j are neighbours.
    """
    WARPS: tl.constexpr = WIDE // HELD
    j_pair = tl.arange(0, 4)[:, None, None, None, None, None, None]
    i_low = tl.arange(0, 8)[None, :, None, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None, None, None]
    j_low = tl.arange(0, 2)[None, None, None, :, None, None, None]
    held = tl.arange(0, HELD)[None, None, None, None, :, None, None]
    i_high = tl.arange(0, 2)[None, None, None, None, None, :, None]
    j_high = tl.arange(0, 2)[None, None, None, None, None, None, :]
    apart = (8 * i_high + i_low - token_at(8 * j_high + 2 * j_pair + j_low)) * unit
    if REVERSE:
        apart = -apart
    place = (W - 1 - shift * CHUNK) - apart
    at = (channel + warp * HELD + held) * W + place
    tile = tl.load(weight_ptr + at, mask=(place >= 0) & (place < W), other=0.0).to(tl.float32)
    return tl.reshape(tl.permute(tile, (4, 2, 6, 0, 3, 5, 1)), [WIDE, CHUNK, CHUNK])


@triton.jit
def add_shift(x, total, high, low, SPLIT: tl.constexpr):
    """total + x (high + low), the tile in two parts if SPLIT."""
    total = dot(x, high, total)
    if SPLIT:
        total = dot(x, low, total)
    return total


@launched(do_not_specialize=["rows", "unit"])
def banded_kernel(
    x_ptr, weight_ptr, bias_ptr, edge_ptr, y_ptr,  # [B,T,D] [D,W] [D] [S,W-1,D] -> [B,T,D]
    start_ptr, before_ptr, rest_ptr, owner_ptr,  # [rows] each if PACKED
    rows, T, D, unit, x_stride_b, x_stride_t,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_EDGE: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    SPLIT: tl.constexpr, SCALED: tl.constexpr, SHIFTS: tl.constexpr, SPAN: tl.constexpr,
    WIDE: tl.constexpr, HELD: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program owns WIDE channels of every so many blocks of ROWS spans.

    edge_ptr: tokens before the first of each sequence; or if REVERSE, where x is dy and y is dx, the gradient that the
    final state adds to the last W-1 tokens. SPLIT: taps have more digits than x. SCALED: and another range.
    """
    OPERAND = x_ptr.dtype.element_ty
    lowest, channel, part, parts = channels_of(D, WIDE, HELD)
    scale = tl.full([WIDE, 1, 1], 1.0, tl.float32)
    if SCALED:
        scale = scale_of(weight_ptr, channel, W, BLOCK_W)
    tile = tile_of(weight_ptr, lowest, unit, 0, W, REVERSE, WIDE, HELD) / scale
    highs = (tile.to(OPERAND),)
    lows = ((tile - tile.to(OPERAND).to(tl.float32)).to(OPERAND),)
    for s in tl.static_range(1, SHIFTS):
        tile = tile_of(weight_ptr, lowest, unit, s, W, REVERSE, WIDE, HELD) / scale
        highs = highs + (tile.to(OPERAND),)
        lows = lows + ((tile - tile.to(OPERAND).to(tl.float32)).to(OPERAND),)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel).to(tl.float32)[:, None, None]
    zero = tl.zeros([WIDE, ROWS, CHUNK], tl.float32)
    row, token = pairs_of_rows(ROWS)
    for block in range(part, (rows + ROWS - 1) // ROWS, parts):
        owner, start, before, rest = spans_of(
            start_ptr, before_ptr, rest_ptr, owner_ptr, block * ROWS + row.to(tl.int64), rows, T, SPAN, PACKED
        )
        sequence = owner * 0 if PACKED else owner
        from_x = sequence * x_stride_b + start * x_stride_t
        from_y = (sequence * T + start) * D
        kept = (zero, zero)
        for _ in tl.static_range(2, SHIFTS):
            kept = kept + (zero,)
        for n in range(0, SPAN // CHUNK + SHIFTS - 1):
            t = token + (n - (SHIFTS - 1)) * CHUNK
            if REVERSE:
                t = token + (SPAN // CHUNK + SHIFTS - 2 - n) * CHUNK
            x = tile_at(x_ptr, from_x + t.to(tl.int64) * x_stride_t, lowest, (t >= -before) & (t < rest), WIDE)
            if HAS_EDGE and not REVERSE:
                x += load_edge(edge_ptr, owner, t + before + (W - 1), lowest, rest, D, W, WIDE)
            x = turned(x, ROWS, WIDE, HELD)
            y = add_shift(x, kept[0], highs[0], lows[0], SPLIT)
            grown = (add_shift(x, kept[1], highs[1], lows[1], SPLIT),)
            for s in tl.static_range(2, SHIFTS):
                grown = grown + (add_shift(x, kept[s], highs[s], lows[s], SPLIT),)
            kept = grown + (zero,)
            if SCALED:
                y *= scale
            if HAS_BIAS:
                y += bias
            if HAS_EDGE and REVERSE:
                late = load_edge(edge_ptr, owner, t - rest + (W - 1), lowest, rest, D, W, WIDE)
                out = turned_back(y, ROWS, WIDE, HELD) + late.to(tl.float32)
            else:
                out = turned_back(y.to(y_ptr.dtype.element_ty), ROWS, WIDE, HELD)
            own = (t >= 0) & (t < SPAN) & (t < rest)
            store_tile(y_ptr, from_y + t.to(tl.int64) * D, lowest, out, own, WIDE)

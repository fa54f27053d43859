"""The gradient of many taps on tensor cores: products of chunks of dy and x, summed over diagonals. See banded.py."""

# ruff: noqa: RUF005 (Triton has no starred tuples)

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import dot
from zoo.ops.short_convolution.kernels.banded import (
    CHUNK,
    channels_of,
    load_edge,
    pairs_of_rows,
    spans_of,
    tile_at,
    token_at,
)


@triton.jit
def tokens_first(x, ROWS: tl.constexpr, WIDE: tl.constexpr, HELD: tl.constexpr):
    """Places of `pairs_of_rows`, [WIDE/8,places,8] -> [WIDE,CHUNK,ROWS], tokens ordered as by `turned`."""
    x = tl.reshape(x, [WIDE // 8, ROWS // 2, 2, 2, 4, 2, 8 // HELD, HELD])  # eights, spans, tokens (3), spans, channels
    return tl.reshape(tl.permute(x, (7, 0, 6, 2, 4, 3, 1, 5)), [WIDE, CHUNK, ROWS])


@triton.jit
def spans_first(dy, ROWS: tl.constexpr, WIDE: tl.constexpr, HELD: tl.constexpr):
    """[WIDE/8,ROWS CHUNK,8], span by span -> [WIDE,ROWS,CHUNK] in the order of products."""
    dy = tl.reshape(dy, [WIDE // 8, ROWS, CHUNK, 8 // HELD, HELD])
    return tl.reshape(tl.permute(dy, (4, 0, 3, 1, 2)), [WIDE, ROWS, CHUNK])


@triton.jit
def diagonals(pairs, WIDE: tl.constexpr):
    """Sums of pairs [WIDE,j,i] over i - j = e and over i - j = e - CHUNK, [WIDE,CHUNK] for e = 0 .. CHUNK - 1 both."""
    j = tl.arange(0, CHUNK)[None, :, None]
    e = tl.arange(0, CHUNK)[None, None, :]
    wrapped = tl.gather(pairs, tl.broadcast_to((j + e) % CHUNK, [WIDE, CHUNK, CHUNK]), 2)
    same = tl.sum(tl.where(j + e < CHUNK, wrapped, 0.0), axis=1)
    return same, tl.sum(tl.where(j + e < CHUNK, 0.0, wrapped), axis=1)


@launched(do_not_specialize=["rows"])
def banded_taps_kernel(
    dy_ptr, x_ptr, edge_ptr, sums_ptr,  # [B,T,D] [B,T,D] [S,W-1,D] -> [parts,D,W] float32
    start_ptr, before_ptr, rest_ptr, owner_ptr,  # [rows] each if PACKED
    rows, T, D, dy_stride_b, dy_stride_t, x_stride_b, x_stride_t,
    W: tl.constexpr, HAS_EDGE: tl.constexpr, PACKED: tl.constexpr, SHIFTS: tl.constexpr, SPAN: tl.constexpr,
    WIDE: tl.constexpr, HELD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program owns WIDE channels of every so many blocks of ROWS spans: their share of the sums.

    pairs_s[j,i] = sum over spans and chunks c of x_{c-s,j} dy_{c,i} has lag CHUNK s + i - j. The chunks of x that wait
    for later ones of dy are first multiplied by one: a result of a product is laid out as the next one's left operand.
    """
    OPERAND = x_ptr.dtype.element_ty
    lowest, channel, part, parts = channels_of(D, WIDE, HELD)
    k = tl.arange(0, CHUNK)
    one = tl.where(k[:, None] == token_at(k)[None, :], 1.0, 0.0)[None, :, :]
    one = tl.broadcast_to(one, [WIDE, CHUNK, CHUNK]).to(OPERAND)
    zero = tl.zeros([WIDE, CHUNK, CHUNK], tl.float32)
    nothing = tl.zeros([WIDE, CHUNK, ROWS], OPERAND)
    pairs = (zero,)
    for _ in tl.static_range(1, SHIFTS):
        pairs = pairs + (zero,)
    x_row, x_token = pairs_of_rows(ROWS)
    place = tl.arange(0, CHUNK * ROWS)
    dy_row, dy_token = place // CHUNK, place % CHUNK
    for block in range(part, (rows + ROWS - 1) // ROWS, parts):
        owner, start, before, x_rest = spans_of(
            start_ptr, before_ptr, rest_ptr, owner_ptr, block * ROWS + x_row.to(tl.int64), rows, T, SPAN, PACKED
        )
        dy_owner, dy_start, _before, dy_rest = spans_of(
            start_ptr, before_ptr, rest_ptr, owner_ptr, block * ROWS + dy_row.to(tl.int64), rows, T, SPAN, PACKED
        )
        from_x = start * x_stride_t
        from_dy = dy_start * dy_stride_t
        if not PACKED:
            from_x += owner * x_stride_b
            from_dy += dy_owner * dy_stride_b
        waiting = (nothing,)
        for _ in tl.static_range(2, SHIFTS):
            waiting = waiting + (nothing,)
        for n in range(0, (SPAN // CHUNK + 2 * SHIFTS - 3) // (SHIFTS - 1)):
            xs, dys = (), ()
            for u in tl.static_range(0, SHIFTS - 1):
                chunk = (n - 1) * (SHIFTS - 1) + u
                t = x_token + chunk * CHUNK
                inside = (t >= -before) & (t < x_rest)
                x = tile_at(x_ptr, from_x + t.to(tl.int64) * x_stride_t, lowest, inside, WIDE)
                if HAS_EDGE:
                    x += load_edge(edge_ptr, owner, t + before + (W - 1), lowest, x_rest, D, W, WIDE)
                xs = xs + (tokens_first(x, ROWS, WIDE, HELD),)  # [WIDE, CHUNK, ROWS]
                t = dy_token + chunk * CHUNK
                inside = (t >= 0) & (t < SPAN) & (t < dy_rest)
                dy = tile_at(dy_ptr, from_dy + t.to(tl.int64) * dy_stride_t, lowest, inside, WIDE)
                dys = dys + (spans_first(dy, ROWS, WIDE, HELD),)  # [WIDE, ROWS, CHUNK]
            for u in tl.static_range(SHIFTS - 1):
                waiting = (dot(one, xs[u], zero).to(OPERAND),) + waiting  # the newest first
                grown = (dot(waiting[0], dys[u], pairs[0]),)
                for s in tl.static_range(1, SHIFTS):
                    grown = grown + (dot(waiting[s], dys[u], pairs[s]),)
                pairs = grown
                waiting = waiting[: SHIFTS - 1]
    at = sums_ptr + (part * D + channel[:, None]) * W + (W - 1 - k)[None, :]
    total, _ahead = diagonals(pairs[0], WIDE)
    for s in tl.static_range(1, SHIFTS):
        same, earlier = diagonals(pairs[s], WIDE)
        lag = (s - 1) * CHUNK + k
        tl.store(at - (s - 1) * CHUNK, total + earlier, mask=(lag < W)[None, :])
        total = same
    lag = (SHIFTS - 1) * CHUNK + k
    tl.store(at - (SHIFTS - 1) * CHUNK, total, mask=(lag < W)[None, :])

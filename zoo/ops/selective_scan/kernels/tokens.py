"""Jitted pieces of the selective scan's kernels: spans of tokens, tiles of states, time steps, gates."""

# ruff: noqa: RUF005  # Triton adds tuples up, and takes no starred ones
# mypy: disable-error-code="assignment, unreachable, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.primitives import LN2, LOG2E, LOG2E_REST, exponential, quotient

FIT_0 = tl.constexpr(0.3333333366846907)  # (atanh(s) / s - 1) / s^2 in powers of s^2
FIT_1 = tl.constexpr(0.19999850708085468)
FIT_2 = tl.constexpr(0.14296291080104387)
FIT_3 = tl.constexpr(0.108516609156027)
FIT_4 = tl.constexpr(0.11619528077191316)


@triton.jit
def span_of(piece, owner_ptr, cu_ptr, T, pieces, SIZE, PACKED: tl.constexpr):
    """Sequence, start and end of the sequence, and first token and end of piece number `piece`, all int64.

    A sequence is cut every SIZE tokens; token numbers run over the flattened batch. In a packed row piece numbers are
    first // SIZE + sequence + k, so that none has to be summed; those that no token falls into have first >= end.
    An empty sequence has one piece.
    """
    piece = piece.to(tl.int64)
    if PACKED:
        sequence = tl.load(owner_ptr + piece)
        start = tl.load(cu_ptr + sequence).to(tl.int64)
        end = tl.load(cu_ptr + sequence + 1).to(tl.int64)
        first = start + (piece - start // SIZE - sequence) * SIZE
    else:
        sequence = piece // pieces
        start = sequence * T
        end = start + T
        first = start + piece % pieces * SIZE
    return sequence, start, end, first, tl.minimum(first + SIZE, end)


@triton.jit
def decay_of(rate, step, EXACT: tl.constexpr):
    """Decay of a tile [ROWS,BLOCK_E] of states over a time step [BLOCK_E]; rate as `rates` returns it.

    EXACT: what rounding takes from A step and from its product with log2(e) is a factor of its own.
    """
    if EXACT:
        wide = tl.broadcast_to(step[None, :], rate.shape)
        product = rate * wide
        high = product * LOG2E
        low = tl.fma(product, LOG2E, -high) + product * LOG2E_REST + tl.fma(rate, wide, -product) * LOG2E
        decay = tl.exp2(high) * (1.0 + tl.where(tl.abs(high) < 200.0, low, 0.0) * LN2)
    else:
        decay = tl.exp2(rate * step[None, :])
    return decay


@triton.jit
def time_step(raw, live, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr):
    """dt [BLOCK_E] from its raw value, 0 where no token is: the state then stays as it is.

    softplus keeps the digits of small results: log(1 + u) = 2 atanh(s) with s = u / (2 + u) in (0, 1/3], as a
    polynomial whose relative error is below 4e-10.
    """
    if SOFTPLUS:
        u = exponential(-tl.abs(raw), EXACT)
        s = quotient(u, 2.0 + u, EXACT)
        q = s * s
        series = FIT_3 + q * FIT_4
        series = FIT_2 + q * series
        series = FIT_1 + q * series
        series = FIT_0 + q * series
        raw = tl.maximum(raw, 0.0) + 2.0 * s * (1.0 + q * series)
    return tl.where(live, raw, 0.0)


@triton.jit
def channel_block(group, number, J: tl.constexpr, BLOCK_E: tl.constexpr):
    """Channels e [BLOCK_E] of block `number` of the J channels of a group, and their mask.

    They are declared not to follow each other: neighbouring lanes then hold neighbouring channels, one each.
    """
    of_group = number * BLOCK_E + tl.arange(0, BLOCK_E)
    return tl.max_contiguous(group * J + of_group, 1), of_group < J


@triton.jit
def load_channels(ptr, e, in_e, PRESENT: tl.constexpr):
    """Values [BLOCK_E] of channels, zeros for an absent tensor."""
    values = e * 0.0
    if PRESENT:
        values = tl.load(ptr + e, mask=in_e, other=0.0)
    return values


@triton.jit
def load_states(ptr, e, live, N: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr):
    """States [.., E, N] of channels e as a tuple of TILES tiles [ROWS, BLOCK_E]; zeros where not live [BLOCK_E].

    A tile of 4 rows is read as one vector by each lane, so that its states stay inside a lane.
    """
    tiles = ()
    for r in tl.static_range(TILES):
        n = r * ROWS + tl.arange(0, ROWS)
        inside = (n < N)[:, None] & live[None, :]
        tiles = tiles + (tl.load(ptr + (e[None, :] * N + n[:, None]), mask=inside, other=0.0),)
    return tiles


@triton.jit
def store_states(ptr, tiles, e, live, N: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr):
    """The counterpart of `load_states`."""
    for r in tl.static_range(TILES):
        n = r * ROWS + tl.arange(0, ROWS)
        inside = (n < N)[:, None] & live[None, :]
        tl.store(ptr + (e[None, :] * N + n[:, None]), tiles[r], mask=inside)


@triton.jit
def zero_states(TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr):
    """A tuple of TILES tiles of zeros."""
    tiles = ()
    for _r in tl.static_range(TILES):
        tiles = tiles + (tl.zeros([ROWS, BLOCK_E], tl.float32),)
    return tiles


@triton.jit
def rates(
    A_ptr, e, in_e, N: tl.constexpr, EXACT: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """A log2(e) in tiles: decay over a step is 2^(rate step). EXACT: A as it is, for `decay_of`."""
    loaded = load_states(A_ptr, e, in_e, N, TILES, ROWS, BLOCK_E)
    tiles = ()
    for r in tl.static_range(TILES):
        tiles = tiles + (loaded[r] if EXACT else loaded[r] * LOG2E,)
    return tiles


@triton.jit
def load_row(row_ptr, r: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr):
    """States r ROWS .. of a key or query, [ROWS]; float32, so that lanes need not convert what they all share."""
    n = r * ROWS + tl.arange(0, ROWS)
    if (r + 1) * ROWS <= N:
        row = tl.load(row_ptr + n)
    else:
        row = tl.load(row_ptr + n, mask=n < N, other=0.0)
    return row


@triton.jit
def load_tokens(ptr, t, stride, left, e, in_e, TILE: tl.constexpr, PRESENT: tl.constexpr):
    """Values [BLOCK_E] of TILE tokens from t on, as a tuple; zeros from the `left`-th on. Absent: an empty tuple."""
    values = ()
    zero = tl.zeros(in_e.shape, tl.int32)  # the interpreter wants masks as wide
    if PRESENT:
        row = ptr + t * stride
        for k in tl.static_range(TILE):
            values = values + (tl.load(row + (k * stride + e), mask=in_e & (zero + k < left), other=0.0),)
    return values


@triton.jit
def touch_rows(ptr, t, stop, stride: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """A value out of every 32 bytes of the rows of keys or queries of tokens t .. t + TILE, [TILE max(1, WIDTH / 8)].

    What is read with them lies in the first cache when the rows are wanted: a row serves one token, so that no other
    lane brings it. WIDTH: N filled up to a power of two. The values are good for nothing.
    """
    SECTORS: tl.constexpr = (WIDTH + 7) // 8
    i = tl.arange(0, TILE * SECTORS)
    token, n = t + i // SECTORS, i % SECTORS * 8
    return tl.load(ptr + (token * stride + n), mask=(token < stop) & (n < N), other=0.0)

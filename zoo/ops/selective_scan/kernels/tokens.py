"""Jitted pieces of the selective scan's kernels: spans of tokens, blocks of channels, time steps, gates."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
def sigmoid(raw):
    """1 / (1 + e^-raw)."""
    return 1.0 / (1.0 + tl.exp2(-raw * LOG2E))


@triton.jit
def time_step(raw, live, SOFTPLUS: tl.constexpr):
    """dt [BLOCK_E] from its raw value, 0 where no token is: the state then stays as it is.

    softplus keeps the digits of small results: log(1 + u) = 2 atanh(s) with s = u / (2 + u) in (0, 1/3], as a series.
    """
    if SOFTPLUS:
        u = tl.exp2(-tl.abs(raw) * LOG2E)
        s = u / (2.0 + u)
        q = s * s
        series = 1.0 / 13.0 + q * (1.0 / 15.0)
        series = 1.0 / 11.0 + q * series
        series = 1.0 / 9.0 + q * series
        series = 1.0 / 7.0 + q * series
        series = 1.0 / 5.0 + q * series
        series = 1.0 / 3.0 + q * series
        raw = tl.maximum(raw, 0.0) + 2.0 * s * (1.0 + q * series)
    return tl.where(live, raw, 0.0)


@triton.jit
def channel_block(group, number, J: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """Block `number` of the J channels of a group.

    Returns the channels e and their mask [BLOCK_E], the mask of a tile [BLOCK_N,BLOCK_E], and the places of its
    elements in [E,N]. Places are declared not to follow each other: a tile then keeps its channels spread over the
    lanes and its states inside a lane, where a compiler that sees rows would take vectors and sum states over lanes.
    """
    of_group = number * BLOCK_E + tl.arange(0, BLOCK_E)
    e = tl.max_contiguous(group * J + of_group, 1)
    in_e = of_group < J
    in_tile = (tl.arange(0, BLOCK_N) < N)[:, None] & in_e[None, :]
    return e, in_e, in_tile, e[None, :] * N + tl.max_contiguous(tl.arange(0, BLOCK_N), 1)[:, None]


@triton.jit
def load_channels(ptr, e, in_e, PRESENT: tl.constexpr):
    """Values [BLOCK_E] of channels, zeros for an absent tensor."""
    values = e * 0.0
    if PRESENT:
        values = tl.load(ptr + e, mask=in_e, other=0.0)
    return values

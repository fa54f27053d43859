"""Jitted pieces of the LTI attention kernels: chunks, rows of the flattened state, tables."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.semiseparable.kernels.decay import token_range


@triton.jit
def chunk_span(slot, owner_ptr, cu_ptr, T, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """First token (int64) and number of tokens (int32) of the chunk in a slot, and whether it goes on a sequence.

    A spare slot has no tokens: the number is 0 or less.
    """
    if PACKED:
        sequence = tl.load(owner_ptr + slot).to(tl.int64)
    else:
        sequence = slot // ((T + CHUNK - 1) // CHUNK)
    start, end, first_slot = token_range(sequence, cu_ptr, T, CHUNK, PACKED)
    first = start + (slot - first_slot) * CHUNK
    return first, tl.minimum(end - first, CHUNK).to(tl.int32), slot != first_slot


@triton.jit
def state_rows(block, M: tl.constexpr, P: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr):
    """Rows of a state [M,2,P,P] flattened to (mode, key channel): modes, channels, mask, each [ROWS].

    Every mode takes BLOCK_K rows, P rounded up to a power of two.
    """
    row = block * ROWS + tl.arange(0, ROWS)
    mode = row // BLOCK_K
    channel = row % BLOCK_K
    return mode, channel, (mode < M) & (channel < P)


@triton.jit
def state_tile(ptr, mode, row_steps, column_steps, row_mask, column_mask, part: tl.constexpr, P: tl.constexpr):
    """Tile [ROWS, COLUMNS] of one state [M,2,P,P]: real (part 0) or imaginary (1) parts, float32."""
    at = (mode * 2 + part)[:, None] * (P * P) + row_steps[:, None] + column_steps[None, :]
    return tl.load(ptr + at, mask=row_mask[:, None] & column_mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def weight_tile(
    ptr, block, mode, lag, mode_mask, lag_mask, part: tl.constexpr, M: tl.constexpr, LAGS: tl.constexpr,
    ALONE: tl.constexpr,
):  # fmt: skip
    """Tile [LAG, ROWS] of the table [2,M,LAGS] of one head; ALONE: all rows are of mode `block`, [LAG, 1]."""
    if ALONE:
        weight = tl.load(ptr + (part * M + block) * LAGS + lag, mask=lag_mask, other=0.0)[:, None]
    else:
        at = (part * M + mode)[None, :] * LAGS + lag[:, None]
        weight = tl.load(ptr + at, mask=lag_mask[:, None] & mode_mask[None, :], other=0.0)
    return weight

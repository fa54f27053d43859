"""Chunk states of LTI attention, forward in time and, for their gradients, backward."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.lti_attention.kernels.pieces import state_rows, state_tile, weight_tile
from zoo.ops.semiseparable.kernels.decay import load_tokens, product, token_range


@launched(do_not_specialize=["T"])
def states_kernel(
    left_ptr, right_ptr,  # [BT,H,P]: k and v, or q and dy in reverse
    powers_ptr, read_ptr,  # [H,2,M,CHUNK+1] [H,2,M,CHUNK] float32, contiguous
    first_ptr, cu_ptr,  # [S,H,M,2,P,P] float32, contiguous: initial state, or dfinal in reverse; int [S+1]
    states_ptr, last_ptr,  # [slots,H,M,2,P,P], contiguous; [S,H,M,2,P,P] float32, contiguous
    T, left_stride_t, left_stride_h, right_stride_t, right_stride_h,
    H: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
    HAS_FIRST: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    STORE_STATES: tl.constexpr, STORE_LAST: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS x BLOCK_V of the state of one (sequence, head) and walks its chunks.

    Forward: writes the state that enters each chunk, at last the one after the last token. In reverse: the gradient of
    the state that leaves it, at last that of the initial state. A last chunk of fewer than CHUNK tokens decays by as
    many steps as it has.
    """
    sequence = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    start, end, slot = token_range(sequence, cu_ptr, T, CHUNK, PACKED)
    block = tl.program_id(1)
    mode, channel, in_rows = state_rows(block, M, P, BLOCK_K, ROWS)
    in_modes = mode < M
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_columns = column < P
    in_state = in_rows[:, None] & in_columns[None, :]
    inside = (mode * 2)[:, None] * (P * P) + channel[:, None] * P + column[None, :]  # of one state [M,2,P,P]
    ends = (sequence * H + head) * (M * 2 * P * P)
    left_ptr += head * left_stride_h
    right_ptr += head * right_stride_h
    powers = powers_ptr + head * (2 * M * (CHUNK + 1))
    power_row = powers + mode * (CHUNK + 1)
    if REVERSE:
        table = read_ptr + head * (2 * M * CHUNK)
    else:
        table = powers
    LAGS: tl.constexpr = CHUNK if REVERSE else CHUNK + 1

    re = tl.zeros([ROWS, BLOCK_V], tl.float32)
    im = tl.zeros([ROWS, BLOCK_V], tl.float32)
    if HAS_FIRST:
        re += state_tile(first_ptr + ends, mode, channel * P, column, in_rows, in_columns, 0, P)
        im += state_tile(first_ptr + ends, mode, channel * P, column, in_rows, in_columns, 1, P)
    chunks = ((end - start + CHUNK - 1) // CHUNK).to(tl.int32)
    for count in range(0, chunks):
        if REVERSE:
            chunk = chunks - 1 - count
        else:
            chunk = count
        if STORE_STATES:
            at = states_ptr + ((slot + chunk) * H + head) * (M * 2 * P * P) + inside
            tl.store(at, re.to(states_ptr.dtype.element_ty), mask=in_state)
            tl.store(at + P * P, im.to(states_ptr.dtype.element_ty), mask=in_state)
        first = start + chunk * CHUNK
        filled = tl.minimum(end - first, CHUNK).to(tl.int32)
        over_re = tl.load(power_row + filled, mask=in_modes, other=0.0)[:, None]
        over_im = tl.load(power_row + M * (CHUNK + 1) + filled, mask=in_modes, other=0.0)[:, None]
        if REVERSE:
            over_im = -over_im
        kept = over_re * re - over_im * im
        im = over_re * im + over_im * re
        re = kept
        for tile in range(0, (filled + TILE - 1) // TILE):
            step = tile * TILE + tl.arange(0, TILE)
            in_chunk = step < filled
            t = first + step
            left = tl.load(
                left_ptr + t[None, :] * left_stride_t + channel[:, None],
                mask=in_rows[:, None] & in_chunk[None, :],
                other=0.0,
            ).to(tl.float32)  # [ROWS, TILE]
            right = load_tokens(right_ptr, t, right_stride_t, column, in_chunk, in_columns)  # [TILE, BLOCK_V]
            if REVERSE:
                lag = step
            else:
                lag = filled - 1 - step
            weight_re = weight_tile(table, block, mode, lag, in_modes, in_chunk, 0, M, LAGS, ROWS == BLOCK_K)
            weight_im = weight_tile(table, block, mode, lag, in_modes, in_chunk, 1, M, LAGS, ROWS == BLOCK_K)
            re += product(left * tl.trans(weight_re), right, OPERAND)
            im += product(left * tl.trans(weight_im), right, OPERAND)
    if STORE_LAST:
        tl.store(last_ptr + ends + inside, re, mask=in_state)
        tl.store(last_ptr + ends + inside + P * P, im, mask=in_state)

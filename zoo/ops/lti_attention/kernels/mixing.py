"""The kernel behind the output and the gradients of q, k and v: masked products in a chunk, and a read of a state."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.lti_attention.kernels.pieces import chunk_span, state_rows, state_tile, weight_tile
from zoo.ops.semiseparable.kernels.decay import load_tokens, product


@launched(do_not_specialize=["T"])
def mix_kernel(
    a_ptr, b_ptr, w_ptr,  # [BT,H,P] each
    taps_ptr, table_ptr,  # [H,CHUNK]; read [H,2,M,LAGS=CHUNK], in reverse powers [H,2,M,LAGS=CHUNK+1]; float32
    states_ptr, cu_ptr, owner_ptr,  # [slots,H,M,2,P,P], contiguous; int [S+1]; int64 [slots], sequence of a slot
    out_ptr,  # [BT,H,P], contiguous
    T, a_stride_t, a_stride_h, b_stride_t, b_stride_h, w_stride_t, w_stride_h,
    H: tl.constexpr, M: tl.constexpr, P: tl.constexpr, LAGS: tl.constexpr,
    HAS_STATES: tl.constexpr, HAS_FIRST: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_V channels of out_i = sum_j K_|i-j| <a_i, b_j> w_j + a_i^T S for TILE tokens i of a chunk.

    j runs over the chunk up to i, in reverse from i on; S is what `table` weighs together from the state that enters
    the chunk, in reverse from the gradient of the one that leaves it. With (a, b, w) it gives:
    y: (q, k, v). dq: (dy, v, k), TRANSPOSED. dv: (k, q, dy), REVERSE. dk: (v, dy, q), REVERSE and TRANSPOSED.
    """
    tiles: tl.constexpr = CHUNK // TILE
    head = (tl.program_id(0) % H).to(tl.int64)
    tile = (tl.program_id(0) // H) % tiles
    slot = (tl.program_id(0) // H // tiles).to(tl.int64)
    first, filled, goes_on = chunk_span(slot, owner_ptr, cu_ptr, T, CHUNK, PACKED)
    if tile * TILE < filled:
        i = tile * TILE + tl.arange(0, TILE)
        in_i = i < filled
        t = first + i
        p = tl.arange(0, BLOCK_P)
        in_p = p < P
        column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        in_columns = column < P
        a_ptr += head * a_stride_h
        b_ptr += head * b_stride_h
        w_ptr += head * w_stride_h
        a = load_tokens(a_ptr, t, a_stride_t, p, in_i, in_p)  # [TILE, BLOCK_P]
        out = tl.zeros([TILE, BLOCK_V], tl.float32)
        if REVERSE:
            low, high = tile, (filled + TILE - 1) // TILE
        else:
            low, high = 0, tile + 1
        for other in range(low, high):
            j = other * TILE + tl.arange(0, TILE)
            in_j = j < filled
            b = load_tokens(b_ptr, first + j, b_stride_t, p, in_j, in_p)  # [TILE, BLOCK_P]
            w = load_tokens(w_ptr, first + j, w_stride_t, column, in_j, in_columns)  # [TILE, BLOCK_V]
            lag = i[:, None] - j[None, :]
            if REVERSE:
                lag = -lag
            tap = tl.load(taps_ptr + head * CHUNK + lag, mask=lag >= 0, other=0.0)  # [TILE, TILE]
            out += product(product(a, tl.trans(b), OPERAND) * tap, w, OPERAND)
        if HAS_STATES:  # noqa: SIM102 (known when compiling; the next one is not)
            if goes_on | HAS_FIRST:
                states_ptr += (slot * H + head) * (M * 2 * P * P)
                table_ptr += head * (2 * M * LAGS)
                if REVERSE:
                    lag_of_i = filled - 1 - i
                else:
                    lag_of_i = i
                for block in range(0, (M * BLOCK_K + ROWS - 1) // ROWS):
                    mode, channel, in_rows = state_rows(block, M, P, BLOCK_K, ROWS)
                    if ROWS == BLOCK_K:  # every channel of one mode
                        wide = a.to(tl.float32)
                    else:
                        wide = tl.load(
                            a_ptr + t[:, None] * a_stride_t + channel[None, :],
                            mask=in_i[:, None] & in_rows[None, :],
                            other=0.0,
                        ).to(tl.float32)  # [TILE, ROWS]
                    if TRANSPOSED:
                        row_steps, column_steps = channel, column * P
                    else:
                        row_steps, column_steps = channel * P, column
                    for part in tl.static_range(2):
                        state = state_tile(
                            states_ptr, mode, row_steps, column_steps, in_rows, in_columns, part, P
                        )  # [ROWS, BLOCK_V]
                        weight = weight_tile(
                            table_ptr, block, mode, lag_of_i, in_rows, in_i, part, M, LAGS, ROWS == BLOCK_K
                        )
                        out += product(wide * weight, state, OPERAND)
        out_at = (t * H + head)[:, None] * P + column[None, :]
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=in_i[:, None] & in_columns[None, :])

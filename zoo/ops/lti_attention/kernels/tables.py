"""Gradients of what all sequences share: the taps inside a chunk, and the tables of powers between chunks."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.lti_attention.kernels.pieces import chunk_span, state_rows, state_tile
from zoo.ops.semiseparable.kernels.decay import load_tokens, product


@launched(do_not_specialize=["T", "slots", "each"])
def tap_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr,  # [BT,H,P] each
    cu_ptr, owner_ptr,  # int [S+1]; int64 [slots]
    sums_ptr,  # [splits,H,CHUNK/TILE,TILE,TILE] float32
    T, slots, each, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, dy_stride_t, dy_stride_h,
    H: tl.constexpr, P: tl.constexpr, PACKED: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_P: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One program owns the pairs of tiles that lie `apart` tiles from each other, in `each` slots of one head.

    Entry [i,j] sums <q_i, k_j> <dy_i, v_j>; it belongs to the lag apart * TILE + i - j, whatever the tile.
    """
    tiles: tl.constexpr = CHUNK // TILE
    head = (tl.program_id(0) % H).to(tl.int64)
    apart = tl.program_id(0) // H
    q_ptr += head * q_stride_h
    k_ptr += head * k_stride_h
    v_ptr += head * v_stride_h
    dy_ptr += head * dy_stride_h
    step = tl.arange(0, TILE)
    p = tl.arange(0, BLOCK_P)
    in_p = p < P
    sums = tl.zeros([TILE, TILE], tl.float32)
    slot = tl.program_id(1).to(tl.int64) * each
    for _ in range(0, tl.minimum(each, slots - slot).to(tl.int32)):
        first, filled, _ = chunk_span(slot, owner_ptr, cu_ptr, T, CHUNK, PACKED)
        for tile in range(apart, (filled + TILE - 1) // TILE):
            i = tile * TILE + step
            j = i - apart * TILE
            in_i = i < filled
            in_j = j < filled
            q = load_tokens(q_ptr, first + i, q_stride_t, p, in_i, in_p)  # [TILE, BLOCK_P]
            k = load_tokens(k_ptr, first + j, k_stride_t, p, in_j, in_p)
            v = load_tokens(v_ptr, first + j, v_stride_t, p, in_j, in_p)
            dy = load_tokens(dy_ptr, first + i, dy_stride_t, p, in_i, in_p)
            sums += product(q, tl.trans(k), OPERAND) * product(dy, tl.trans(v), OPERAND)
        slot += 1
    at = ((tl.program_id(1).to(tl.int64) * H + head) * tiles + apart) * (TILE * TILE)
    tl.store(sums_ptr + at + step[:, None] * TILE + step[None, :], sums)


@launched(do_not_specialize=["T", "slots"])
def table_gradient_kernel(
    a_ptr, b_ptr,  # [BT,H,P]: q and dy, with POWERS k and v
    states_ptr, entering_ptr,  # [slots,H,M,2,P,P]: states that enter; POWERS: gradients of those that leave, and they
    cu_ptr, owner_ptr,  # int [S+1]; int64 [slots]
    dtable_ptr,  # [H,2,M,LAGS] float32
    T, slots, a_stride_t, a_stride_h, b_stride_t, b_stride_h,
    H: tl.constexpr, M: tl.constexpr, P: tl.constexpr, LAGS: tl.constexpr,
    HAS_FIRST: tl.constexpr, PACKED: tl.constexpr, POWERS: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One program owns TILE lags and ROWS / BLOCK_K modes of a table: sums of a_i^T S_n b_i over all chunks.

    The read table: the lag is i itself. Powers: token i of a chunk of r tokens wrote with lag r - 1 - i, and the state
    that entered was kept with lag r.
    """
    head = (tl.program_id(0) % H).to(tl.int64)
    lag = tl.program_id(0) // H * TILE + tl.arange(0, TILE)
    mode, channel, in_rows = state_rows(tl.program_id(1), M, P, BLOCK_K, ROWS)
    p = tl.arange(0, BLOCK_P)
    in_p = p < P
    a_ptr += head * a_stride_h
    b_ptr += head * b_stride_h
    size: tl.constexpr = M * 2 * P * P
    re = tl.zeros([TILE, ROWS], tl.float32)
    im = tl.zeros([TILE, ROWS], tl.float32)
    slot = head * 0  # int64
    for _ in range(0, slots):
        first, filled, goes_on = chunk_span(slot, owner_ptr, cu_ptr, T, CHUNK, PACKED)
        if filled > 0:
            if POWERS:
                i = filled - 1 - lag
            else:
                i = lag
            in_i = (i >= 0) & (i < filled)
            state = states_ptr + (slot * H + head) * size
            state_re = state_tile(state, mode, channel * P, p, in_rows, in_p, 0, P)  # [ROWS, BLOCK_P]
            state_im = state_tile(state, mode, channel * P, p, in_rows, in_p, 1, P)
            a = tl.load(
                a_ptr + (first + i)[:, None] * a_stride_t + channel[None, :],
                mask=in_i[:, None] & in_rows[None, :],
                other=0.0,
            ).to(tl.float32)  # [TILE, ROWS]
            b = load_tokens(b_ptr, first + i, b_stride_t, p, in_i, in_p)  # [TILE, BLOCK_P]
            re += a * product(b, tl.trans(state_re), OPERAND)
            im += a * product(b, tl.trans(state_im), OPERAND)
            if POWERS:  # noqa: SIM102 (known when compiling; the next one is not)
                if goes_on | HAS_FIRST:
                    before = entering_ptr + (slot * H + head) * size
                    before_re = state_tile(before, mode, channel * P, p, in_rows, in_p, 0, P)
                    before_im = state_tile(before, mode, channel * P, p, in_rows, in_p, 1, P)
                    kept_re = tl.sum(state_re * before_re + state_im * before_im, axis=1)  # [ROWS]
                    kept_im = tl.sum(state_im * before_re - state_re * before_im, axis=1)
                    here = (lag == filled)[:, None]
                    re += tl.where(here, kept_re[None, :], 0.0)
                    im += tl.where(here, kept_im[None, :], 0.0)
        slot += 1
    modes: tl.constexpr = ROWS // BLOCK_K
    owned = tl.program_id(1) * modes + tl.arange(0, modes)
    mask = (lag < LAGS)[:, None] & (owned < M)[None, :]
    at = dtable_ptr + head * (2 * M * LAGS) + owned[None, :] * LAGS + lag[:, None]
    tl.store(at, tl.sum(tl.reshape(re, [TILE, modes, BLOCK_K]), axis=2), mask=mask)
    tl.store(at + M * LAGS, tl.sum(tl.reshape(im, [TILE, modes, BLOCK_K]), axis=2), mask=mask)

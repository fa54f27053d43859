"""Forward of the selective scan: one pass over the tokens with the state in registers."""

# ruff: noqa: RUF005  # Triton adds tuples up, and takes no starred ones
# mypy: disable-error-code="assignment, unreachable, var-annotated"

from __future__ import annotations

import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import sigmoid
from zoo.ops.selective_scan.kernels.tokens import (
    channel_block,
    decay_of,
    load_channels,
    load_row,
    load_states,
    load_tokens,
    rates,
    span_of,
    store_states,
    time_step,
    touch_rows,
    zero_states,
)  # fmt: skip


@launched(do_not_specialize=["T", "pieces", "SEGMENT"])
def scan_kernel(
    x_ptr, dt_ptr, z_ptr, B_ptr, C_ptr,  # [BT,E] [BT,E] [BT,E] [BT,G,N] [BT,G,N]; B, C float32, contiguous
    A_ptr, D_ptr, bias_ptr,  # [E,N] [E] [E] float32, contiguous
    initial_ptr, entering_ptr,  # [S,E,N], or [segments,E,N] if SPLIT, float32, contiguous
    owner_ptr, cu_ptr,  # [segments] int64, [S+1] if PACKED
    y_ptr, states_ptr, final_ptr,  # -> [BT,E], [BT // CHUNK,E,N] and [S,E,N] float32, contiguous
    T, pieces, SEGMENT, x_stride, dt_stride, z_stride,
    E: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    SOFTPLUS: tl.constexpr, SPLIT: tl.constexpr, PACKED: tl.constexpr,
    CHUNK: tl.constexpr, TOUCH: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_E channels of one segment of a sequence, and all their states, in TILES tiles of ROWS.

    It keeps the state at every multiple of CHUNK inside the sequence for the backward. TILE tokens are read together,
    one tile ahead of those that are computed, and written together, so that nothing waits for memory.
    """
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    J: tl.constexpr = E // G
    BLOCKS: tl.constexpr = (J + BLOCK_E - 1) // BLOCK_E
    segment = tl.program_id(0) // (G * BLOCKS)
    block = tl.program_id(0) % (G * BLOCKS)
    group = block // BLOCKS
    sequence, start, end, first, stop = span_of(segment, owner_ptr, cu_ptr, T, pieces, SEGMENT, PACKED)
    e, in_e = channel_block(group, block % BLOCKS, J, BLOCK_E)
    zero = tl.zeros([BLOCK_E], tl.int32)  # the interpreter wants masks as wide as their values
    rate = rates(A_ptr, e, in_e, N, EXACT, TILES, ROWS, BLOCK_E)
    skip = load_channels(D_ptr, e, in_e, HAS_D)
    bias = load_channels(bias_ptr, e, in_e, HAS_BIAS)
    if SPLIT:
        state = load_states(entering_ptr + segment.to(tl.int64) * E * N, e, in_e, N, TILES, ROWS, BLOCK_E)
    elif HAS_INITIAL:
        state = load_states(initial_ptr + sequence * E * N, e, in_e, N, TILES, ROWS, BLOCK_E)
    else:
        state = zero_states(TILES, ROWS, BLOCK_E)
    states_ptr += (start // CHUNK + (first - start) // CHUNK - 1) * E * N
    B_ptr += group * N
    C_ptr += group * N

    left = (stop - first).to(tl.int32)
    next_raw = load_tokens(dt_ptr, first, dt_stride, left, e, in_e, TILE, True)
    next_value = load_tokens(x_ptr, first, x_stride, left, e, in_e, TILE, True)
    next_gate = load_tokens(z_ptr, first, z_stride, left, e, in_e, TILE, HAS_Z)
    if TOUCH:
        met_key = touch_rows(B_ptr, first, stop, G * N, N, TILE, TILES * ROWS)
        met_query = touch_rows(C_ptr, first, stop, G * N, N, TILE, TILES * ROWS)
        sink = met_key * 0.0
    for tile in range(0, (left + TILE - 1) // TILE):
        t = first + tile * TILE
        if tile * TILE % CHUNK == 0:
            saved = in_e & (zero + start < t)
            store_states(states_ptr + (t - first) // CHUNK * (E * N), state, e, saved, N, TILES, ROWS, BLOCK_E)
        left = (stop - t).to(tl.int32)
        raws, values, gates = next_raw, next_value, next_gate
        if TOUCH:
            sink += met_key + met_query
            met_key = touch_rows(B_ptr, t + TILE, stop, G * N, N, TILE, TILES * ROWS)
            met_query = touch_rows(C_ptr, t + TILE, stop, G * N, N, TILE, TILES * ROWS)
        next_raw = load_tokens(dt_ptr, t + TILE, dt_stride, left - TILE, e, in_e, TILE, True)
        next_value = load_tokens(x_ptr, t + TILE, x_stride, left - TILE, e, in_e, TILE, True)
        next_gate = load_tokens(z_ptr, t + TILE, z_stride, left - TILE, e, in_e, TILE, HAS_Z)
        for k in tl.static_range(TILE):
            row = tl.minimum(t + k, stop - 1) * (G * N)  # beyond the end any token does: the step is 0
            here = in_e & (zero + k < left)
            step = time_step(raws[k].to(tl.float32) + bias, here, SOFTPLUS, EXACT)
            value = values[k].to(tl.float32)
            entering = step * value
            y = skip * value
            products = tl.zeros([ROWS, BLOCK_E], tl.float32)
            held = ()
            for r in tl.static_range(TILES):
                key = load_row(B_ptr + row, r, N, ROWS)
                query = load_row(C_ptr + row, r, N, ROWS)
                part = decay_of(rate[r], step, EXACT) * state[r] + key[:, None] * entering[None, :]
                products += part * query[:, None]
                held = held + (part,)
            state = held
            y += tl.sum(products, axis=0)
            if HAS_Z:
                gate = gates[k].to(tl.float32)
                y = y * gate * sigmoid(gate, EXACT)
            tl.store(y_ptr + (t + k) * E + e, y.to(y_ptr.dtype.element_ty), mask=here)
    last = in_e & (zero + stop == end) & ((zero + first < end) | (zero + first == start))
    store_states(final_ptr + sequence * E * N, state, e, last, N, TILES, ROWS, BLOCK_E)
    if TOUCH:  # never written, but the compiler has to believe in it
        tl.store(final_ptr + tl.arange(0, sink.shape[0]), sink, mask=sink.to(tl.int32, bitcast=True) * 0 + T < 0)

"""What crosses segments of the selective scan: states forward in time, their gradients backward."""

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
def summary_kernel(
    value_ptr, dt_ptr, z_ptr, key_ptr,  # [BT,E] [BT,E] [BT,E] [BT,G,N]: x, dt, -, B, or dy, dt, z, C in reverse
    A_ptr, bias_ptr,  # [E,N] [E] float32, contiguous; the key as well
    owner_ptr, cu_ptr,  # [segments] int64, [S+1] if PACKED
    carried_ptr, elapsed_ptr,  # -> [segments,E,N] [segments,E] float32, contiguous
    T, pieces, SEGMENT, value_stride, dt_stride, z_stride,
    E: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    TOUCH: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_E channels of one segment of a sequence, read from first to last token or in REVERSE.

    It starts from zero and writes what the tokens of the segment alone leave, and their sum of time steps. Forward:
    state <- decay state + dt x B. In reverse the gradient of the state: grad <- decay (grad + dy C).
    """
    EXACT: tl.constexpr = value_ptr.dtype.element_ty == tl.float32
    J: tl.constexpr = E // G
    BLOCKS: tl.constexpr = (J + BLOCK_E - 1) // BLOCK_E
    segment = tl.program_id(0) // (G * BLOCKS)
    block = tl.program_id(0) % (G * BLOCKS)
    group = block // BLOCKS
    _, start, end, first, stop = span_of(segment, owner_ptr, cu_ptr, T, pieces, SEGMENT, PACKED)
    e, in_e = channel_block(group, block % BLOCKS, J, BLOCK_E)
    zero = tl.zeros([BLOCK_E], tl.int32)  # the interpreter wants masks as wide as their values
    rate = rates(A_ptr, e, in_e, N, EXACT, TILES, ROWS, BLOCK_E)
    bias = load_channels(bias_ptr, e, in_e, HAS_BIAS)
    elapsed, lost = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
    state = zero_states(TILES, ROWS, BLOCK_E)
    key_ptr += group * N

    tiles = ((stop - first + TILE - 1) // TILE).to(tl.int32)
    if REVERSE:
        needed = first > start
    else:
        needed = stop < end
    tiles = tl.where(needed, tiles, 0)  # what the last segment leaves arrives nowhere
    at = first
    if REVERSE:
        at = first + (tiles - 1) * TILE
    left = (stop - at).to(tl.int32)
    next_raw = load_tokens(dt_ptr, at, dt_stride, left, e, in_e & (zero < tiles), TILE, True)
    next_value = load_tokens(value_ptr, at, value_stride, left, e, in_e & (zero < tiles), TILE, True)
    next_gate = load_tokens(z_ptr, at, z_stride, left, e, in_e & (zero < tiles), TILE, HAS_Z)
    if TOUCH:
        met = touch_rows(key_ptr, at, stop, G * N, N, TILE, TILES * ROWS)
        sink = met * 0.0
    for number in range(0, tiles):
        tile, following = number, number + 1
        if REVERSE:
            tile, following = tiles - 1 - number, tiles - 2 - number
        t, at = first + tile * TILE, first + following * TILE
        left = (stop - t).to(tl.int32)
        raws, values, gates = next_raw, next_value, next_gate
        if TOUCH:
            sink += met
            met = touch_rows(key_ptr, tl.maximum(at, first), stop, G * N, N, TILE, TILES * ROWS)
        some, after = in_e & (zero + following >= 0), (stop - at).to(tl.int32)
        next_raw = load_tokens(dt_ptr, at, dt_stride, after, e, some, TILE, True)
        next_value = load_tokens(value_ptr, at, value_stride, after, e, some, TILE, True)
        next_gate = load_tokens(z_ptr, at, z_stride, after, e, some, TILE, HAS_Z)
        for i in tl.static_range(TILE):
            k = TILE - 1 - i if REVERSE else i
            row = tl.minimum(t + k, stop - 1) * (G * N)  # beyond the end any token does: step and value are 0
            step = time_step(
                raws[TILE - 1 - i if REVERSE else i].to(tl.float32) + bias, in_e & (zero + k < left), SOFTPLUS, EXACT
            )
            value = values[TILE - 1 - i if REVERSE else i].to(tl.float32)
            if HAS_Z:
                gate = gates[TILE - 1 - i if REVERSE else i].to(tl.float32)
                value = value * gate * sigmoid(gate, EXACT)
            if not REVERSE:
                value = value * step
            held = ()
            for r in tl.static_range(TILES):
                key = load_row(key_ptr + row, r, N, ROWS)
                decay = decay_of(rate[r], step, EXACT)
                if REVERSE:
                    part = decay * (state[r] + key[:, None] * value[None, :])
                else:
                    part = decay * state[r] + key[:, None] * value[None, :]
                held = held + (part,)
            state = held
            if EXACT:  # Kahan summation
                term = step - lost
                grown = elapsed + term
                lost = (grown - elapsed) - term
                elapsed = grown
            else:
                elapsed += step
    store_states(carried_ptr + segment.to(tl.int64) * E * N, state, e, in_e, N, TILES, ROWS, BLOCK_E)
    tl.store(elapsed_ptr + segment.to(tl.int64) * E + e, elapsed, mask=in_e)
    if TOUCH:  # never written, but the compiler has to believe in it
        tl.store(elapsed_ptr + tl.arange(0, sink.shape[0]), sink, mask=sink.to(tl.int32, bitcast=True) * 0 + T < 0)


@launched(do_not_specialize=["T", "pieces", "SEGMENT"])
def link_kernel(
    A_ptr, given_ptr, elapsed_ptr, cu_ptr,  # [E,N] [S,E,N] [segments,E] float32, contiguous; [S+1] if PACKED
    carried_ptr,  # [segments,E,N] float32, contiguous: what the tokens of each leave -> what arrives at it
    T, pieces, SEGMENT,
    E: tl.constexpr, N: tl.constexpr, HAS_GIVEN: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_E channels of one sequence and carries its state over the segments."""
    BLOCKS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    sequence = (tl.program_id(0) // BLOCKS).to(tl.int64)
    e, in_e = channel_block(0, tl.program_id(0) % BLOCKS, E, BLOCK_E)
    rate = rates(A_ptr, e, in_e, N, True, TILES, ROWS, BLOCK_E)
    segment = sequence * pieces
    count = pieces
    if PACKED:
        start = tl.load(cu_ptr + sequence).to(tl.int64)
        tokens = tl.load(cu_ptr + sequence + 1).to(tl.int64) - start
        segment = start // SEGMENT + sequence
        count = tl.maximum((tokens + SEGMENT - 1) // SEGMENT, 1).to(tl.int32)
    if HAS_GIVEN:
        state = load_states(given_ptr + sequence * E * N, e, in_e, N, TILES, ROWS, BLOCK_E)
    else:
        state = zero_states(TILES, ROWS, BLOCK_E)
    for number in range(0, count):
        piece = segment + number
        if REVERSE:
            piece = segment + (count - 1 - number)
        own = load_states(carried_ptr + piece * E * N, e, in_e, N, TILES, ROWS, BLOCK_E)
        store_states(carried_ptr + piece * E * N, state, e, in_e, N, TILES, ROWS, BLOCK_E)
        elapsed = tl.load(elapsed_ptr + piece * E + e, mask=in_e, other=0.0)
        held = ()
        for r in tl.static_range(TILES):
            held = held + (decay_of(rate[r], elapsed, True) * state[r] + own[r],)
        state = held

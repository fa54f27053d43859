"""Backward of the selective scan: one walk from the last token to the first, states computed again chunk by chunk."""

# ruff: noqa: RUF005  # Triton adds tuples up, and takes no starred ones
# mypy: disable-error-code="assignment, unreachable, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import LN2, sigmoid
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


@triton.jit
def keep_states(
    state, rate, bias, e, in_e,  # [TILES][ROWS,BLOCK_E] twice, [BLOCK_E] three times
    scratch_ptr, dt_ptr, x_ptr, B_ptr, C_ptr, dt_stride, x_stride, B_stride: tl.constexpr, first, stop, tiles,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, TOUCH: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write the states at every TILE tokens of a chunk to scratch memory, and return those at its last tile.

    state: what enters the chunk. TOUCH: read keys and queries ahead; what they add up to is returned as well.
    """
    zero = tl.zeros([BLOCK_E], tl.int32)
    own = tl.max_contiguous(tl.arange(0, BLOCK_E), 1)
    left = (stop - first).to(tl.int32)
    next_raw = load_tokens(dt_ptr, first, dt_stride, left, e, in_e, TILE, True)
    next_value = load_tokens(x_ptr, first, x_stride, left, e, in_e, TILE, True)
    met_key = touch_rows(B_ptr, first, stop if TOUCH else first, B_stride, N, TILE, TILES * ROWS)
    met_query = touch_rows(C_ptr, first, stop if TOUCH else first, B_stride, N, TILE, TILES * ROWS)
    sink = met_key * 0.0
    for tile in range(0, tiles - 1):
        at = scratch_ptr + tile * (TILES * ROWS * BLOCK_E)
        store_states(at, state, own, zero == 0, TILES * ROWS, TILES, ROWS, BLOCK_E)
        t = first + tile * TILE
        left = (stop - t).to(tl.int32)
        raws, values = next_raw, next_value
        if TOUCH:
            sink += met_key + met_query
            met_key = touch_rows(B_ptr, t + TILE, stop, B_stride, N, TILE, TILES * ROWS)
            met_query = touch_rows(C_ptr, t + TILE, stop, B_stride, N, TILE, TILES * ROWS)
        next_raw = load_tokens(dt_ptr, t + TILE, dt_stride, left - TILE, e, in_e, TILE, True)
        next_value = load_tokens(x_ptr, t + TILE, x_stride, left - TILE, e, in_e, TILE, True)
        for k in tl.static_range(TILE):
            step = time_step(raws[k].to(tl.float32) + bias, zero == 0, SOFTPLUS, EXACT)
            entering = step * values[k].to(tl.float32)
            held = ()
            for r in tl.static_range(TILES):
                key = load_row(B_ptr + (t + k) * B_stride, r, N, ROWS)
                held = held + (decay_of(rate[r], step, EXACT) * state[r] + key[:, None] * entering[None, :],)
            state = held
    return state, sink + met_key + met_query


@triton.jit
def entering_states(
    states_ptr, initial_ptr, initial_offset, first, start, e, in_e,
    HAS_INITIAL: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """What enters the chunk that begins at token `first`: the kept state, or the initial one of the sequence."""
    zero = tl.zeros([BLOCK_E], tl.int32)
    state = load_states(states_ptr, e, in_e & (zero + start < first), N, TILES, ROWS, BLOCK_E)
    if HAS_INITIAL:
        begins = in_e & (zero + first == start)
        loaded = load_states(initial_ptr + initial_offset, e, begins, N, TILES, ROWS, BLOCK_E)
        joined = ()
        for r in tl.static_range(TILES):
            joined = joined + (state[r] + loaded[r],)
        state = joined
    return state


@triton.jit
def tile_states(
    state, rate, bias, raw, value,  # [TILES][ROWS,BLOCK_E] twice, [BLOCK_E], [TILE][BLOCK_E] twice
    B_ptr, t, stop, left, in_e, B_stride: tl.constexpr,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of the tokens of a tile: time steps [TILE], decays, and decays times the states before, [TILE TILES]."""
    zero = tl.zeros([BLOCK_E], tl.int32)
    steps, decays, kept = (), (), ()
    for k in tl.static_range(TILE):
        row = tl.minimum(t + k, stop - 1) * B_stride  # beyond the end any token does: the step is 0
        step = time_step(raw[k].to(tl.float32) + bias, in_e & (zero + k < left), SOFTPLUS, EXACT)
        entering = step * value[k].to(tl.float32)
        steps = steps + (step,)
        held = ()
        for r in tl.static_range(TILES):
            decay = decay_of(rate[r], step, EXACT)
            decayed = decay * state[r]
            decays, kept = decays + (decay,), kept + (decayed,)
            if k < TILE - 1:
                held = held + (decayed + load_row(B_ptr + row, r, N, ROWS)[:, None] * entering[None, :],)
        state = held
    return steps, decays, kept


@triton.jit
def reverse_token(
    grad, drate, rate, bias, skip,  # [TILES][ROWS,BLOCK_E] three times, [BLOCK_E] twice
    steps, decays, kept, raw, value, cotangent, gates, e, in_e,  # of a tile's tokens, see `tile_states`
    B_ptr, C_ptr, dx_ptr, ddt_ptr, dz_ptr, dB_ptr, dC_ptr,
    t, stop, left, shift, E: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    HAS_Z: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, k: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write the gradients of token k of the tile that begins at t, from `grad`, that of the state after it.

    Returns the gradient of the state before it, drate with its share, and what it adds to those of D and dt_bias.
    """
    row = tl.minimum(t + k, stop - 1) * (G * N)
    zero = tl.zeros([BLOCK_E], tl.int32)
    here = in_e & (zero + k < left)
    at = (t + k) * E + e
    step, v = steps[k], value[k].to(tl.float32)
    weight = cotangent[k].to(tl.float32)
    out = skip * v
    if HAS_Z:
        gate = gates[k].to(tl.float32)
        slope = sigmoid(gate, EXACT)
        tilted = weight * slope * (1.0 + gate * (1.0 - slope))
        weight = weight * gate * slope
    entered, crossed = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
    entering = step * v
    lower, sums = (), ()
    for r in tl.static_range(TILES):
        key, query = load_row(B_ptr + row, r, N, ROWS), load_row(C_ptr + row, r, N, ROWS)
        decayed = kept[k * TILES + r]
        held = decayed + key[:, None] * entering[None, :]
        if HAS_Z:
            out += tl.sum(held * query[:, None], axis=0)
        part = grad[r] + query[:, None] * weight[None, :]
        both = tl.join(held * weight[None, :], part * entering[None, :])
        dquery, dkey = tl.split(tl.sum(both, axis=1))  # [ROWS]
        entered += tl.sum(part * key[:, None], axis=0)  # gradient of dt x
        crossing = part * decayed
        crossed += tl.sum(crossing * rate[r], axis=0)
        sums = sums + (drate[r] + crossing * step[None, :],)
        lower = lower + (part * decays[k * TILES + r],)
        n = r * ROWS + tl.arange(0, ROWS)
        live = (n < N) & (tl.zeros([ROWS], tl.int32) + k < left)
        tl.store(dC_ptr + (t + k + shift) * N + n, dquery, mask=live)
        tl.store(dB_ptr + (t + k + shift) * N + n, dkey, mask=live)
    if not EXACT:
        crossed *= LN2
    dstep = crossed + v * entered
    if SOFTPLUS:
        dstep = dstep * sigmoid(raw[k].to(tl.float32) + bias, EXACT)
    dstep = tl.where(here, dstep, 0.0)
    if HAS_Z:
        tl.store(dz_ptr + at, (tilted * out).to(dz_ptr.dtype.element_ty), mask=here)
    tl.store(ddt_ptr + at, dstep.to(ddt_ptr.dtype.element_ty), mask=here)
    tl.store(dx_ptr + at, (step * entered + skip * weight).to(dx_ptr.dtype.element_ty), mask=here)
    return lower, sums, weight * v, dstep


@launched(do_not_specialize=["T", "rows", "pieces", "SEGMENT", "slab", "SLAB"])
def gradient_kernel(
    x_ptr, dt_ptr, z_ptr, B_ptr, C_ptr, dy_ptr,  # [BT,E] three times, [BT,G,N] twice, [BT,E]; B, C float32, contiguous
    A_ptr, D_ptr, bias_ptr, initial_ptr,  # [E,N] [E] [E] [S,E,N] float32, contiguous
    states_ptr,  # [BT // CHUNK,E,N] float32, contiguous, from the forward
    dfinal_ptr, arriving_ptr,  # [S,E,N], or [segments,E,N] if SPLIT, float32, contiguous; the latter -> what leaves
    owner_ptr, cu_ptr,  # [segments] int64, [S+1] if PACKED
    scratch_ptr,  # [programs,CHUNK // TILE,BLOCK_E,TILES ROWS] float32
    dx_ptr, ddt_ptr, dz_ptr, dinitial_ptr,  # -> [BT,E] three times, [S,E,N] float32, contiguous
    dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr,  # -> [segments,E,N], [G blocks,rows,N] twice, [segments,E] twice
    T, pieces, SEGMENT, slab, SLAB, rows, x_stride, dt_stride, z_stride, dy_stride,
    E: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_GIVEN: tl.constexpr, SOFTPLUS: tl.constexpr, SPLIT: tl.constexpr, PACKED: tl.constexpr,
    CHUNK: tl.constexpr, TOUCH: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_E channels of one segment of a sequence, if SPLIT only tokens slab SLAB .. (slab + 1) SLAB
    of it: the shares of dB and dC then have SLAB rows for each segment, else one for each token.
    dA, dD and dbias of a chunk are added to what those after it left in them.

    Chunks follow each other from the last to the first. In each the states at every TILE tokens go to scratch memory;
    then, from the last tile to the first, its states are computed once more, and its tokens taken in reverse.
    """
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    J: tl.constexpr = E // G
    BLOCKS: tl.constexpr = (J + BLOCK_E - 1) // BLOCK_E
    segment = tl.program_id(0) // (G * BLOCKS)
    block = tl.program_id(0) % (G * BLOCKS)
    group = block // BLOCKS
    sequence, start, _end, begin, finish = span_of(segment, owner_ptr, cu_ptr, T, pieces, SEGMENT, PACKED)
    shift = begin * 0  # from a token to its row of the shares
    if SPLIT:
        begin += slab.to(tl.int64) * SLAB
        finish = tl.minimum(finish, begin + SLAB)
        if not PACKED:
            shift = segment.to(tl.int64) * SLAB - begin
    e, in_e = channel_block(group, block % BLOCKS, J, BLOCK_E)
    zero = tl.zeros([BLOCK_E], tl.int32)  # the interpreter wants masks as wide as their values
    own = tl.max_contiguous(tl.arange(0, BLOCK_E), 1)
    rate = rates(A_ptr, e, in_e, N, EXACT, TILES, ROWS, BLOCK_E)
    skip = load_channels(D_ptr, e, in_e, HAS_D)
    bias = load_channels(bias_ptr, e, in_e, HAS_BIAS)
    B_ptr += group * N
    C_ptr += group * N
    dB_ptr += block.to(tl.int64) * rows * N
    dC_ptr += block.to(tl.int64) * rows * N
    scratch_ptr += tl.program_id(0).to(tl.int64) * (CHUNK // TILE * TILES * ROWS * BLOCK_E)
    dA_ptr += segment.to(tl.int64) * E * N
    dD_ptr += segment.to(tl.int64) * E
    dbias_ptr += segment.to(tl.int64) * E
    if SPLIT:  # grad: of the state after a token, through later tokens
        grad = load_states(arriving_ptr + segment.to(tl.int64) * E * N, e, in_e, N, TILES, ROWS, BLOCK_E)
    elif HAS_GIVEN:
        grad = load_states(dfinal_ptr + sequence * E * N, e, in_e, N, TILES, ROWS, BLOCK_E)
    else:
        grad = zero_states(TILES, ROWS, BLOCK_E)

    chunks = ((finish - begin + CHUNK - 1) // CHUNK).to(tl.int32)
    for number in range(0, chunks):
        first = begin + (chunks - 1 - number) * CHUNK
        stop = tl.minimum(first + CHUNK, finish)
        tiles = ((stop - first + TILE - 1) // TILE).to(tl.int32)
        slot = start // CHUNK + (first - start) // CHUNK - 1
        state = entering_states(
            states_ptr + slot * E * N, initial_ptr, sequence * E * N, first, start, e, in_e,
            HAS_INITIAL, N, TILES, ROWS, BLOCK_E,
        )  # fmt: skip
        state, sink = keep_states(
            state, rate, bias, e, in_e, scratch_ptr, dt_ptr, x_ptr, B_ptr, C_ptr, dt_stride, x_stride, G * N,
            first, stop, tiles, N, SOFTPLUS, EXACT, TOUCH, TILE, TILES, ROWS, BLOCK_E,
        )  # fmt: skip
        tl.debug_barrier()  # lanes may read from scratch what others wrote
        drate = zero_states(TILES, ROWS, BLOCK_E)  # of the chunk: sums of sums keep digits
        dskip, dbias = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
        if TOUCH:
            t = first + (tiles - 1) * TILE
            left = (stop - t).to(tl.int32)
            next_raw = load_tokens(dt_ptr, t, dt_stride, left, e, in_e, TILE, True)
            next_value = load_tokens(x_ptr, t, x_stride, left, e, in_e, TILE, True)
            next_cotangent = load_tokens(dy_ptr, t, dy_stride, left, e, in_e, TILE, True)
            next_gate = load_tokens(z_ptr, t, z_stride, left, e, in_e, TILE, HAS_Z)
        for back in range(0, tiles):
            tile = tiles - 1 - back
            t = first + tile * TILE
            left = (stop - t).to(tl.int32)
            if TOUCH:
                raw, value, cotangent, gates = next_raw, next_value, next_cotangent, next_gate
                some = in_e & (zero + tile > 0)
                next_raw = load_tokens(dt_ptr, t - TILE, dt_stride, TILE, e, some, TILE, True)
                next_value = load_tokens(x_ptr, t - TILE, x_stride, TILE, e, some, TILE, True)
                next_cotangent = load_tokens(dy_ptr, t - TILE, dy_stride, TILE, e, some, TILE, True)
                next_gate = load_tokens(z_ptr, t - TILE, z_stride, TILE, e, some, TILE, HAS_Z)
            else:
                raw = load_tokens(dt_ptr, t, dt_stride, left, e, in_e, TILE, True)
                value = load_tokens(x_ptr, t, x_stride, left, e, in_e, TILE, True)
                cotangent = load_tokens(dy_ptr, t, dy_stride, left, e, in_e, TILE, True)
                gates = load_tokens(z_ptr, t, z_stride, left, e, in_e, TILE, HAS_Z)
            steps, decays, kept = tile_states(
                state, rate, bias, raw, value, B_ptr, t, stop, left, in_e,
                G * N, N, SOFTPLUS, EXACT, TILE, TILES, ROWS, BLOCK_E,
            )  # fmt: skip
            if tile > 0:  # read for the next round
                before = scratch_ptr + (tile - 1) * (TILES * ROWS * BLOCK_E)
                after = load_states(before, own, zero == 0, TILES * ROWS, TILES, ROWS, BLOCK_E)
            else:
                after = zero_states(TILES, ROWS, BLOCK_E)
            for i in tl.static_range(TILE):
                grad, drate, dvalue, dstep = reverse_token(
                    grad, drate, rate, bias, skip, steps, decays, kept, raw, value, cotangent, gates, e, in_e,
                    B_ptr, C_ptr, dx_ptr, ddt_ptr, dz_ptr, dB_ptr, dC_ptr, t, stop, left, shift, E, G, N,
                    HAS_Z, SOFTPLUS, EXACT, TILE - 1 - i, TILES, ROWS, BLOCK_E,
                )  # fmt: skip
                dskip += dvalue
                dbias += dstep
            state = after
        tl.debug_barrier()  # the next chunk writes where this one reads
        later = load_states(dA_ptr, e, in_e, N, TILES, ROWS, BLOCK_E)
        grown = ()
        for r in tl.static_range(TILES):
            grown = grown + (later[r] + drate[r],)
        store_states(dA_ptr, grown, e, in_e, N, TILES, ROWS, BLOCK_E)
        if TOUCH:  # never written, but the compiler has to believe in it
            tl.store(dA_ptr + tl.arange(0, sink.shape[0]), sink, mask=sink.to(tl.int32, bitcast=True) * 0 + T < 0)
        if HAS_D:
            tl.store(dD_ptr + e, load_channels(dD_ptr, e, in_e, True) + dskip, mask=in_e)
        if HAS_BIAS:
            tl.store(dbias_ptr + e, load_channels(dbias_ptr, e, in_e, True) + dbias, mask=in_e)
    if SPLIT:
        store_states(arriving_ptr + segment.to(tl.int64) * E * N, grad, e, in_e, N, TILES, ROWS, BLOCK_E)
    if HAS_INITIAL:
        begins = in_e & (zero + begin == start)
        store_states(dinitial_ptr + sequence * E * N, grad, e, begins, N, TILES, ROWS, BLOCK_E)

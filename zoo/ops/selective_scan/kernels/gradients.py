"""Backward of the selective scan: chunks on their own, states computed again, then the tokens from last to first."""

# ruff: noqa: RUF005  # Triton adds tuples up, and takes no starred ones
# mypy: disable-error-code="assignment, unreachable, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.selective_scan.kernels.tokens import LN2, LOG2E, channel_block, load_channels, sigmoid, span_of, time_step


@triton.jit
def keep_states(
    state, rate, bias, e, in_e,  # [BLOCK_N,BLOCK_E] twice, [BLOCK_E] three times
    scratch_ptr, in_tile, dt_ptr, x_ptr, B_ptr, dt_stride, x_stride, B_stride, first, stop, tiles,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write the states at every TILE tokens of a chunk to scratch memory. state: the one that enters the chunk."""
    n = tl.arange(0, BLOCK_N)
    in_n = n < N
    zero_n, zero_e = tl.zeros([BLOCK_N], tl.int32), tl.zeros([BLOCK_E], tl.int32)
    for tile in range(0, tiles):
        tl.store(scratch_ptr + tile * (BLOCK_N * BLOCK_E) + in_tile, state)
        t = first + tile * TILE
        left = (stop - t).to(tl.int32)
        dt_row, x_row, B_row = dt_ptr + t * dt_stride, x_ptr + t * x_stride, B_ptr + t * B_stride
        for k in tl.static_range(TILE):
            here, keep = in_e & (zero_e + k < left), in_n & (zero_n + k < left)
            raw = tl.load(dt_row + k * dt_stride + e, mask=here, other=0.0).to(tl.float32) + bias
            step = time_step(raw, here, SOFTPLUS)
            value = tl.load(x_row + k * x_stride + e, mask=here, other=0.0).to(tl.float32)
            key = tl.load(B_row + k * B_stride + n, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_N]
            state = tl.exp2(rate * step[None, :]) * state + key[:, None] * (step * value)[None, :]


@triton.jit
def cross_token(
    grad, drate, weight, key, query,  # [BLOCK_N,BLOCK_E] twice, [BLOCK_E], [BLOCK_N] twice
    held, decayed, decay, rate, skip, raw, step, value,  # [BLOCK_N,BLOCK_E] four times, [BLOCK_E] four times
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Take one token in reverse.

    grad: gradient of the state through later tokens; weight: gradient of this token's output before the gate. held:
    this token's state; decayed: decay times the state before. Returns grad before this token, the gradient of the rate
    so far, and those of query, key, raw time step and value.
    """
    grad += query[:, None] * weight[None, :]
    dquery = tl.sum(held * weight[None, :], axis=1)  # [BLOCK_N]
    dkey = tl.sum(grad * (step * value)[None, :], axis=1)
    entered = tl.sum(grad * key[:, None], axis=0)  # [BLOCK_E], gradient of dt x
    crossing = grad * decayed
    drate += crossing * step[None, :]
    dstep = tl.sum(crossing * rate, axis=0) * LN2 + value * entered
    if SOFTPLUS:
        dstep = dstep * sigmoid(raw)
    return grad * decay, drate, dquery, dkey, dstep, step * entered + skip * weight


@triton.jit(do_not_specialize=["T", "BT", "pieces", "parts", "blocks"])
def gradient_kernel(
    x_ptr, dt_ptr, z_ptr, B_ptr, C_ptr, dy_ptr,  # [BT,E] [BT,E] [BT,E] [BT,G,N] [BT,G,N] [BT,E]
    A_ptr, D_ptr, bias_ptr, initial_ptr,  # [E,N] [E] [E] [S,E,N] float32, contiguous
    states_ptr, leaving_ptr,  # [BT // CHUNK,E,N], [slots,E,N] float32, contiguous; leaving_ptr -> share of dA
    owner_ptr, cu_ptr,  # [slots] int64, [S+1] if PACKED
    scratch_ptr,  # [programs,CHUNK // TILE,BLOCK_N,BLOCK_E] float32
    dx_ptr, ddt_ptr, dz_ptr,  # -> [BT,E], contiguous
    dB_ptr, dC_ptr, dD_ptr, dbias_ptr,  # -> [G parts,BT,N] twice and [slots,E] twice, float32: shares of sums
    T, pieces, parts, blocks, x_stride, dt_stride, z_stride, B_stride, B_stride_g, C_stride, C_stride_g, dy_stride,
    BT, E: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program owns one chunk and `blocks` blocks of BLOCK_E channels, of one group, one block after the other.

    First the states at every TILE tokens go to scratch memory; then, from the last tile to the first, its states are
    computed once more, and its tokens taken in reverse.
    """
    J: tl.constexpr = E // G
    slot = tl.program_id(0) // (G * parts)
    part = tl.program_id(0) % (G * parts)
    group = part // parts
    sequence, start, end, first, stop = span_of(slot, owner_ptr, cu_ptr, T, pieces, CHUNK, PACKED)
    tiles = ((tl.maximum(stop - first, 0) + TILE - 1) // TILE).to(tl.int32)
    n = tl.arange(0, BLOCK_N)
    in_n = n < N
    zero_n, zero_e = tl.zeros([BLOCK_N], tl.int32), tl.zeros([BLOCK_E], tl.int32)  # the interpreter wants masks as wide
    zero = zero_n[:, None] + zero_e[None, :]
    B_ptr += group * B_stride_g
    C_ptr += group * C_stride_g
    dB_ptr += part.to(tl.int64) * BT * N
    dC_ptr += part.to(tl.int64) * BT * N
    leaving_ptr += slot.to(tl.int64) * E * N
    states_ptr += (start // CHUNK + (first - start) // CHUNK - 1) * E * N
    scratch_ptr += tl.program_id(0).to(tl.int64) * (CHUNK // TILE * BLOCK_N * BLOCK_E)
    in_tile = n[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    for block in range(0, blocks):
        number = part % parts * blocks + block
        e, in_e, in_state, by_channel = channel_block(group, number, J, N, BLOCK_N, BLOCK_E)
        rate = tl.load(A_ptr + by_channel, mask=in_state, other=0.0) * LOG2E  # [BLOCK_N, BLOCK_E]
        skip = load_channels(D_ptr, e, in_e, HAS_D)
        bias = load_channels(bias_ptr, e, in_e, HAS_BIAS)
        inside = in_state & (zero + start < first) & (zero + first < end)
        state = tl.load(states_ptr + by_channel, mask=inside, other=0.0)
        if HAS_INITIAL:
            begins = in_state & (zero + first == start)
            state += tl.load(initial_ptr + sequence * E * N + by_channel, mask=begins, other=0.0)
        keep_states(
            state, rate, bias, e, in_e, scratch_ptr, in_tile, dt_ptr, x_ptr, B_ptr, dt_stride, x_stride, B_stride,
            first, stop, tiles, N, SOFTPLUS, TILE, BLOCK_N, BLOCK_E,
        )  # fmt: skip
        tl.debug_barrier()  # lanes may read from scratch what others wrote

        used = in_state & (zero + first < end)
        grad = tl.load(leaving_ptr + by_channel, mask=used, other=0.0)  # of the state after a token
        drate = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
        dskip, dbias = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
        for back in range(0, tiles):
            tile = tiles - 1 - back
            t = first + tile * TILE
            left = (stop - t).to(tl.int32)
            dt_row, x_row, B_row = dt_ptr + t * dt_stride, x_ptr + t * x_stride, B_ptr + t * B_stride
            dy_row, C_row = dy_ptr + t * dy_stride, C_ptr + t * C_stride
            dx_row, ddt_row = dx_ptr + t * E, ddt_ptr + t * E
            dB_row, dC_row = dB_ptr + t * N, dC_ptr + t * N
            state = tl.load(scratch_ptr + tile * (BLOCK_N * BLOCK_E) + in_tile)
            raws, steps, values, decays, kept = (), (), (), (), ()
            for k in tl.static_range(TILE):
                here, keep = in_e & (zero_e + k < left), in_n & (zero_n + k < left)
                raw = tl.load(dt_row + k * dt_stride + e, mask=here, other=0.0).to(tl.float32) + bias
                step = time_step(raw, here, SOFTPLUS)
                value = tl.load(x_row + k * x_stride + e, mask=here, other=0.0).to(tl.float32)
                key = tl.load(B_row + k * B_stride + n, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_N]
                decay = tl.exp2(rate * step[None, :])
                decayed = decay * state
                state = decayed + key[:, None] * (step * value)[None, :]
                raws, steps, values = (raw,) + raws, (step,) + steps, (value,) + values  # the last token first
                decays, kept = (decay,) + decays, (decayed,) + kept
            for i in tl.static_range(TILE):
                k = TILE - 1 - i
                here, keep = in_e & (zero_e + k < left), in_n & (zero_n + k < left)
                key = tl.load(B_row + k * B_stride + n, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_N]
                query = tl.load(C_row + k * C_stride + n, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_N]
                weight = tl.load(dy_row + k * dy_stride + e, mask=here, other=0.0).to(tl.float32)  # [BLOCK_E]
                held = kept[i] + key[:, None] * (steps[i] * values[i])[None, :]
                if HAS_Z:
                    gate = tl.load(z_ptr + t * z_stride + (k * z_stride + e), mask=here, other=0.0).to(tl.float32)
                    slope = sigmoid(gate)
                    out = tl.sum(held * query[:, None], axis=0) + skip * values[i]
                    dz = weight * out * slope * (1.0 + gate * (1.0 - slope))
                    tl.store(dz_ptr + t * E + (k * E + e), dz.to(dz_ptr.dtype.element_ty), mask=here)
                    weight = weight * gate * slope
                grad, drate, dquery, dkey, dstep, dx = cross_token(
                    grad, drate, weight, key, query, held, kept[i], decays[i], rate, skip, raws[i], steps[i], values[i],
                    SOFTPLUS,
                )  # fmt: skip
                dquery += tl.load(dC_row + k * N + n, mask=keep & (zero_n < block), other=0.0)
                dkey += tl.load(dB_row + k * N + n, mask=keep & (zero_n < block), other=0.0)
                tl.store(dC_row + k * N + n, dquery, mask=keep)
                tl.store(dB_row + k * N + n, dkey, mask=keep)
                tl.store(ddt_row + k * E + e, dstep.to(ddt_ptr.dtype.element_ty), mask=here)
                tl.store(dx_row + k * E + e, dx.to(dx_ptr.dtype.element_ty), mask=here)
                dskip += weight * values[i]
                dbias += tl.where(here, dstep, 0.0)
        tl.store(leaving_ptr + by_channel, drate, mask=in_state)
        if HAS_D:
            tl.store(dD_ptr + slot.to(tl.int64) * E + e, dskip, mask=in_e)
        if HAS_BIAS:
            tl.store(dbias_ptr + slot.to(tl.int64) * E + e, dbias, mask=in_e)
        tl.debug_barrier()  # the next block reads the shares that this one wrote

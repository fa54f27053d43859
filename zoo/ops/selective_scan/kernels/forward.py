"""Forward of the selective scan: one pass over the tokens with the state in registers."""

# ruff: noqa: RUF005  # Triton adds tuples up, and takes no starred ones
# mypy: disable-error-code="assignment, unreachable, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.selective_scan.kernels.tokens import LOG2E, channel_block, load_channels, sigmoid, span_of, time_step


@triton.jit(do_not_specialize=["T", "pieces", "SEGMENT"])
def scan_kernel(
    x_ptr, dt_ptr, z_ptr, B_ptr, C_ptr,  # [BT,E] [BT,E] [BT,E] [BT,G,N] [BT,G,N]
    A_ptr, D_ptr, bias_ptr,  # [E,N] [E] [E] float32, contiguous
    initial_ptr, entering_ptr,  # [S,E,N], or [segments,E,N] if SPLIT, float32, contiguous
    owner_ptr, cu_ptr,  # [segments] int64, [S+1] if PACKED
    y_ptr, states_ptr, final_ptr,  # -> [BT,E], [BT // CHUNK,E,N] and [S,E,N] float32, contiguous
    T, pieces, SEGMENT, x_stride, dt_stride, z_stride, B_stride, B_stride_g, C_stride, C_stride_g,
    E: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    SOFTPLUS: tl.constexpr, SPLIT: tl.constexpr, PACKED: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_E channels of one segment of a sequence.

    It keeps the state at every multiple of CHUNK inside the sequence for the backward. TILE tokens are read together,
    then computed one after another, then written, so that no read waits for a write.
    """
    J: tl.constexpr = E // G
    BLOCKS: tl.constexpr = (J + BLOCK_E - 1) // BLOCK_E
    segment = tl.program_id(0) // (G * BLOCKS)
    block = tl.program_id(0) % (G * BLOCKS)
    group = block // BLOCKS
    sequence, start, end, first, stop = span_of(segment, owner_ptr, cu_ptr, T, pieces, SEGMENT, PACKED)
    B_ptr += group * B_stride_g
    C_ptr += group * C_stride_g
    e, in_e, in_state, by_channel = channel_block(group, block % BLOCKS, J, N, BLOCK_N, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_n = n < N
    zero_n, zero_e = tl.zeros([BLOCK_N], tl.int32), tl.zeros([BLOCK_E], tl.int32)  # the interpreter wants masks as wide
    zero = zero_n[:, None] + zero_e[None, :]
    rate = tl.load(A_ptr + by_channel, mask=in_state, other=0.0) * LOG2E  # [BLOCK_N, BLOCK_E]
    skip = load_channels(D_ptr, e, in_e, HAS_D)
    bias = load_channels(bias_ptr, e, in_e, HAS_BIAS)
    ends_at = sequence * E * N + by_channel
    state = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if SPLIT:
        state = tl.load(entering_ptr + segment.to(tl.int64) * E * N + by_channel, mask=in_state, other=0.0)
    elif HAS_INITIAL:
        state = tl.load(initial_ptr + ends_at, mask=in_state, other=0.0)

    for chunk in range(0, ((stop - first + CHUNK - 1) // CHUNK).to(tl.int32)):
        at = first + chunk * CHUNK
        slot = start // CHUNK + (at - start) // CHUNK - 1
        tl.store(states_ptr + slot * E * N + by_channel, state, mask=in_state & (zero + start < at))
        for tile in range(0, ((tl.minimum(CHUNK, stop - at) + TILE - 1) // TILE).to(tl.int32)):
            t = at + tile * TILE
            left = (stop - t).to(tl.int32)
            dt_row, x_row, y_row = dt_ptr + t * dt_stride, x_ptr + t * x_stride, y_ptr + t * E
            B_row, C_row = B_ptr + t * B_stride, C_ptr + t * C_stride
            steps, values, gates, outputs = (), (), (), ()
            for k in tl.static_range(TILE):
                here = in_e & (zero_e + k < left)
                raw = tl.load(dt_row + k * dt_stride + e, mask=here, other=0.0).to(tl.float32) + bias
                steps = steps + (time_step(raw, here, SOFTPLUS),)
                values = values + (tl.load(x_row + k * x_stride + e, mask=here, other=0.0).to(tl.float32),)
                if HAS_Z:
                    gates = gates + (
                        tl.load(z_ptr + t * z_stride + (k * z_stride + e), mask=here, other=0.0).to(tl.float32),
                    )
            for k in tl.static_range(TILE):
                keep = in_n & (zero_n + k < left)
                key = tl.load(B_row + k * B_stride + n, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_N]
                query = tl.load(C_row + k * C_stride + n, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_N]
                decay = tl.exp2(rate * steps[k][None, :])
                state = decay * state + key[:, None] * (steps[k] * values[k])[None, :]
                y = tl.sum(state * query[:, None], axis=0) + skip * values[k]
                if HAS_Z:
                    y = y * gates[k] * sigmoid(gates[k])
                outputs = outputs + (y,)
            for k in tl.static_range(TILE):
                y = outputs[k].to(y_ptr.dtype.element_ty)
                tl.store(y_row + k * E + e, y, mask=in_e & (zero_e + k < left))
    last = in_state & (zero + stop == end) & ((zero + first < end) | (zero + first == start))
    tl.store(final_ptr + ends_at, state, mask=last)

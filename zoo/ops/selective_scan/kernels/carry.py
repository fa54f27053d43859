"""What crosses chunks and segments of the selective scan: states forward in time, their gradients backward."""

# ruff: noqa: RUF005  # Triton adds tuples up, and takes no starred ones
# mypy: disable-error-code="assignment, unreachable, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.selective_scan.kernels.tokens import LOG2E, channel_block, load_channels, sigmoid, span_of, time_step


@triton.jit(do_not_specialize=["T", "pieces", "chunks", "SEGMENT"])
def carry_kernel(
    value_ptr, dt_ptr, z_ptr, key_ptr,  # [BT,E] [BT,E] [BT,E] [BT,G,N]: x, dt, -, B, or dy, dt, z, C in reverse
    A_ptr, bias_ptr,  # [E,N] [E] float32, contiguous
    given_ptr, arriving_ptr,  # [S,E,N], or [segments,E,N] if SPLIT, float32, contiguous
    owner_ptr, cu_ptr,  # [segments] int64, [S+1] if PACKED
    carried_ptr, elapsed_ptr, last_ptr,  # -> [slots,E,N] [segments,E] [S,E,N] float32, contiguous
    T, pieces, chunks, SEGMENT, value_stride, dt_stride, z_stride, key_stride, key_stride_g,
    E: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GIVEN: tl.constexpr, SOFTPLUS: tl.constexpr,
    SPLIT: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, SUMMARY: tl.constexpr, STORE_LAST: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_E channels of one segment of a sequence, read from first to last token or in REVERSE.

    SUMMARY: it starts from zero and writes what its tokens alone leave, and their sum of time steps. Otherwise it
    starts from what is given to the sequence (or arrives at the segment) and writes what stands at the end of each of
    its chunks, then what comes out of the sequence. Forward: state <- decay state + dt x B. In reverse the gradient of
    the state: grad <- decay (grad + dy C).
    """
    J: tl.constexpr = E // G
    BLOCKS: tl.constexpr = (J + BLOCK_E - 1) // BLOCK_E
    segment = tl.program_id(0) // (G * BLOCKS)
    block = tl.program_id(0) % (G * BLOCKS)
    group = block // BLOCKS
    sequence, start, _, first, stop = span_of(segment, owner_ptr, cu_ptr, T, pieces, SEGMENT, PACKED)
    key_ptr += group * key_stride_g
    e, in_e, in_state, by_channel = channel_block(group, block % BLOCKS, J, N, BLOCK_N, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_n = n < N
    zero_n, zero_e = tl.zeros([BLOCK_N], tl.int32), tl.zeros([BLOCK_E], tl.int32)  # the interpreter wants masks as wide
    zero = zero_n[:, None] + zero_e[None, :]
    rate = tl.load(A_ptr + by_channel, mask=in_state, other=0.0) * LOG2E  # [BLOCK_N, BLOCK_E]
    bias = load_channels(bias_ptr, e, in_e, HAS_BIAS)
    elapsed = tl.zeros([BLOCK_E], tl.float32)
    ends_at = sequence * E * N + by_channel
    segment_at = segment.to(tl.int64) * E * N + by_channel
    state = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if not SUMMARY:
        if SPLIT:
            state = tl.load(arriving_ptr + segment_at, mask=in_state, other=0.0)
        elif HAS_GIVEN:
            state = tl.load(given_ptr + ends_at, mask=in_state, other=0.0)
    slot = sequence * chunks  # of the first chunk of the sequence
    if PACKED:
        slot = start // CHUNK + sequence

    count = ((stop - first + CHUNK - 1) // CHUNK).to(tl.int32)
    for number in range(0, count):
        chunk = number
        if REVERSE:
            chunk = count - 1 - number
        at = first + chunk * CHUNK
        if not SUMMARY:
            chunk_at = (slot + (at - start) // CHUNK) * E * N + by_channel
            tl.store(carried_ptr + chunk_at, state, mask=in_state)
        tiles = ((tl.minimum(CHUNK, stop - at) + TILE - 1) // TILE).to(tl.int32)
        for step in range(0, tiles):
            tile = step
            if REVERSE:
                tile = tiles - 1 - step
            t = at + tile * TILE
            left = (stop - t).to(tl.int32)
            dt_row, value_row, key_row = dt_ptr + t * dt_stride, value_ptr + t * value_stride, key_ptr + t * key_stride
            steps, values = (), ()
            for i in tl.static_range(TILE):
                k = TILE - 1 - i if REVERSE else i
                here = in_e & (zero_e + k < left)
                raw = tl.load(dt_row + k * dt_stride + e, mask=here, other=0.0).to(tl.float32) + bias
                value = tl.load(value_row + k * value_stride + e, mask=here, other=0.0).to(tl.float32)
                if HAS_Z:
                    gate = tl.load(z_ptr + t * z_stride + (k * z_stride + e), mask=here, other=0.0).to(tl.float32)
                    value = value * gate * sigmoid(gate)
                steps = steps + (time_step(raw, here, SOFTPLUS),)
                values = values + (value,)
            for i in tl.static_range(TILE):
                k = TILE - 1 - i if REVERSE else i
                keep = in_n & (zero_n + k < left)
                key = tl.load(key_row + k * key_stride + n, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_N]
                decay = tl.exp2(rate * steps[i][None, :])
                if REVERSE:
                    state = decay * (state + key[:, None] * values[i][None, :])
                else:
                    state = decay * state + key[:, None] * (steps[i] * values[i])[None, :]
                elapsed += steps[i]
    if SUMMARY:
        tl.store(carried_ptr + segment_at, state, mask=in_state)
        tl.store(elapsed_ptr + segment.to(tl.int64) * E + e, elapsed, mask=in_e)
    if STORE_LAST:
        tl.store(last_ptr + ends_at, state, mask=in_state & (zero + first == start))


@triton.jit(do_not_specialize=["T", "pieces", "SEGMENT"])
def link_kernel(
    A_ptr, given_ptr, elapsed_ptr, cu_ptr,  # [E,N] [S,E,N] [segments,E] float32, contiguous; [S+1] if PACKED
    carried_ptr,  # [segments,E,N] float32, contiguous: what the tokens of each leave -> what arrives at it
    T, pieces, SEGMENT,
    E: tl.constexpr, N: tl.constexpr, HAS_GIVEN: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_E channels of one sequence and carries its state over the segments."""
    BLOCKS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    sequence = (tl.program_id(0) // BLOCKS).to(tl.int64)
    e, in_e, in_state, by_channel = channel_block(0, tl.program_id(0) % BLOCKS, E, N, BLOCK_N, BLOCK_E)
    rate = tl.load(A_ptr + by_channel, mask=in_state, other=0.0) * LOG2E  # [BLOCK_N, BLOCK_E]
    segment = sequence * pieces
    count = pieces
    if PACKED:
        start = tl.load(cu_ptr + sequence).to(tl.int64)
        tokens = tl.load(cu_ptr + sequence + 1).to(tl.int64) - start
        segment = start // SEGMENT + sequence
        count = tl.maximum((tokens + SEGMENT - 1) // SEGMENT, 1).to(tl.int32)
    state = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if HAS_GIVEN:
        state = tl.load(given_ptr + sequence * E * N + by_channel, mask=in_state, other=0.0)
    for number in range(0, count):
        piece = segment + number
        if REVERSE:
            piece = segment + (count - 1 - number)
        at = carried_ptr + piece * E * N + by_channel
        own = tl.load(at, mask=in_state, other=0.0)
        tl.store(at, state, mask=in_state)
        elapsed = tl.load(elapsed_ptr + piece * E + e, mask=in_e, other=0.0)
        state = tl.exp2(rate * elapsed[None, :]) * state + own

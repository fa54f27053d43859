"""Chunk states of the semiseparable scan, forward in time and, for their gradients, backward."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.semiseparable.kernels.decay import (
    at_end,
    carry,
    chunk_decay,
    decay_from_start,
    decay_to_end,
    load_scale,
    load_tokens,
    product,
    token_range,
)


@launched(do_not_specialize=["T"])
def states_kernel(
    left_ptr, right_ptr,  # [BT,G,N] [BT,H,P]: k and v, or q and dy in reverse
    a_ptr, scale_ptr,  # [BT,H] float32, contiguous
    first_ptr, cu_ptr,  # [S,H,P,N] float32, contiguous: initial state, or dfinal in reverse; int [S+1]
    states_ptr, last_ptr,  # [slots,H,N,P] and [S,H,P,N], float32, contiguous
    T, left_stride_t, left_stride_g, right_stride_t, right_stride_h,
    H: tl.constexpr, J: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_FIRST: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr, STORE_LAST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_P channels of one (sequence, head) and writes the state before each of its chunks.

    Forward: the state that enters a chunk. In reverse: the gradient of the state that leaves it; what comes last is
    then the gradient of the initial state.
    """
    sequence = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    start, end, slot = token_range(sequence, cu_ptr, T, CHUNK, PACKED)
    step = tl.arange(0, CHUNK)
    n = tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_n = n < N
    in_p = p < P
    in_state = in_n[:, None] & in_p[None, :]
    ends_at = (sequence * H + head) * P * N + p[None, :] * N + n[:, None]
    left_ptr += head // J * left_stride_g
    right_ptr += head * right_stride_h

    if HAS_FIRST:
        state = tl.load(first_ptr + ends_at, mask=in_state, other=0.0)  # [BLOCK_N, BLOCK_P]
    else:
        state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    lost = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    chunks = ((end - start + CHUNK - 1) // CHUNK).to(tl.int32)
    for count in range(0, chunks):
        if REVERSE:
            chunk = chunks - 1 - count
        else:
            chunk = count
        state_at = ((slot + chunk) * H + head) * N * P + n[:, None] * P + p[None, :]
        tl.store(states_ptr + state_at, state, mask=in_state)
        t = start + chunk * CHUNK + step
        in_seq = t < end
        coarse, fine, cuts = chunk_decay(a_ptr, t, head, in_seq, H, HAS_DECAY, CHUNK)
        if REVERSE:
            weight = decay_from_start(coarse, fine, cuts, OPERAND)
        else:
            weight = decay_to_end(coarse, fine, cuts, step, CHUNK, OPERAND)
            weight *= load_scale(scale_ptr, t, head, in_seq, H, HAS_SCALE, CHUNK)
        left = load_tokens(left_ptr, t, left_stride_t, n, in_seq, in_n)  # [CHUNK, BLOCK_N]
        right = load_tokens(right_ptr, t, right_stride_t, p, in_seq, in_p)  # [CHUNK, BLOCK_P]
        whole = at_end(decay_from_start(coarse, fine, cuts, OPERAND), step, CHUNK)
        state, lost = carry(state, lost, whole, product(tl.trans(left), right * weight[:, None], OPERAND), OPERAND)
    if STORE_LAST:
        tl.store(last_ptr + ends_at, state, mask=in_state)

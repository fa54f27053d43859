"""Forward kernel of the semiseparable scan."""

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
    pair_decay,
    product,
    token_range,
)


@launched(do_not_specialize=["T"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr,  # [BT,G,N] [BT,G,N] [BT,H,P]
    a_ptr, scale_ptr,  # [BT,H] float32, contiguous
    initial_ptr, cu_ptr,  # [S,H,P,N] float32, contiguous; int [S+1]
    y_ptr, final_ptr,  # [BT,H,P], [S,H,P,N] float32, contiguous
    T, q_stride_t, q_stride_g, k_stride_t, k_stride_g, v_stride_t, v_stride_h,
    H: tl.constexpr, J: tl.constexpr, N: tl.constexpr, P: tl.constexpr,  # J heads of a group
    HAS_DECAY: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_P channels of one (sequence, head) and walks its chunks with the state [N, BLOCK_P]."""
    sequence = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    start, end, _ = token_range(sequence, cu_ptr, T, CHUNK, PACKED)
    step = tl.arange(0, CHUNK)
    n = tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_n = n < N
    in_p = p < P
    in_state = in_n[:, None] & in_p[None, :]
    state_at = (sequence * H + head) * P * N + p[None, :] * N + n[:, None]
    q_ptr += head // J * q_stride_g
    k_ptr += head // J * k_stride_g
    v_ptr += head * v_stride_h

    if HAS_INITIAL:
        state = tl.load(initial_ptr + state_at, mask=in_state, other=0.0)  # [BLOCK_N, BLOCK_P]
    else:
        state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    lost = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for chunk in range(0, ((end - start + CHUNK - 1) // CHUNK).to(tl.int32)):
        t = start + chunk * CHUNK + step
        in_seq = t < end
        coarse, fine, cuts = chunk_decay(a_ptr, t, head, in_seq, H, HAS_DECAY, CHUNK)
        scale = load_scale(scale_ptr, t, head, in_seq, H, HAS_SCALE, CHUNK)
        q = load_tokens(q_ptr, t, q_stride_t, n, in_seq, in_n)  # [CHUNK, BLOCK_N]
        k = load_tokens(k_ptr, t, k_stride_t, n, in_seq, in_n)  # [CHUNK, BLOCK_N]
        v = load_tokens(v_ptr, t, v_stride_t, p, in_seq, in_p)  # [CHUNK, BLOCK_P]

        scores = (
            product(q, tl.trans(k), OPERAND)
            * pair_decay(coarse, fine, cuts, step, HAS_DECAY, False, OPERAND)
            * scale[None, :]
        )
        y = product(q, state, OPERAND) * decay_from_start(coarse, fine, cuts, OPERAND)[:, None]
        y += product(scores, v, OPERAND)
        y_at = (t * H + head)[:, None] * P + p[None, :]
        tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=in_seq[:, None] & in_p[None, :])

        to_end = decay_to_end(coarse, fine, cuts, step, CHUNK, OPERAND) * scale
        whole = at_end(decay_from_start(coarse, fine, cuts, OPERAND), step, CHUNK)
        state, lost = carry(state, lost, whole, product(tl.trans(k), v * to_end[:, None], OPERAND), OPERAND)
    tl.store(final_ptr + state_at, state, mask=in_state)

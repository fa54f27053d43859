"""Gradient kernels of the semiseparable scan: every chunk by itself, given the states at its ends."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.semiseparable.kernels.decay import (
    at_end,
    chunk_decay,
    decay_from_start,
    decay_to_end,
    load_scale,
    load_tokens,
    pair_decay,
    product,
    token_range,
)


@triton.jit
def chunk_of(owner_ptr, cu_ptr, T, H: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """Slot, head, first token and end of this program's chunk; the first token is past the end in a spare slot."""
    slot = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    if PACKED:
        sequence = tl.load(owner_ptr + slot).to(tl.int64)
    else:
        sequence = slot // ((T + CHUNK - 1) // CHUNK)
    start, end, first_slot = token_range(sequence, cu_ptr, T, CHUNK, PACKED)
    return slot, head, start + (slot - first_slot) * CHUNK, end


@launched(do_not_specialize=["T"])
def value_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr,  # [BT,G,N] [BT,G,N] [BT,H,P] [BT,H,P]
    a_ptr, scale_ptr, cu_ptr, owner_ptr,  # [BT,H] [BT,H] float32; int [S+1]; int64 [slots], sequence of a slot
    leaving_ptr,  # [slots,H,N,P] float32: gradient of the state that leaves the chunk
    dv_ptr, dscale_ptr,  # [BT,H,P], [BT,H] float32, contiguous
    T, q_stride_t, q_stride_g, k_stride_t, k_stride_g, v_stride_t, v_stride_h, dy_stride_t, dy_stride_h,
    H: tl.constexpr, J: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_SCALE: tl.constexpr, PACKED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One program owns one (chunk, head): dv and the gradient of its scale."""
    slot, head, first, end = chunk_of(owner_ptr, cu_ptr, T, H, CHUNK, PACKED)
    if first < end:
        step = tl.arange(0, CHUNK)
        n = tl.arange(0, BLOCK_N)
        t = first + step
        in_seq = t < end
        in_n = n < N
        coarse, fine, cuts = chunk_decay(a_ptr, t, head, in_seq, H, HAS_DECAY, CHUNK)
        to_end = decay_to_end(coarse, fine, cuts, step, CHUNK, OPERAND)
        scale = load_scale(scale_ptr, t, head, in_seq, H, HAS_SCALE, CHUNK)
        q = load_tokens(q_ptr + head // J * q_stride_g, t, q_stride_t, n, in_seq, in_n)  # [CHUNK, BLOCK_N]
        k = load_tokens(k_ptr + head // J * k_stride_g, t, k_stride_t, n, in_seq, in_n)  # [CHUNK, BLOCK_N]
        scores = product(k, tl.trans(q), OPERAND) * pair_decay(
            coarse, fine, cuts, step, HAS_DECAY, True, OPERAND
        )  # [j, i]
        dscale = tl.zeros([CHUNK], tl.float32)
        for block in range(0, (P + BLOCK_P - 1) // BLOCK_P):
            p = block * BLOCK_P + tl.arange(0, BLOCK_P)
            in_p = p < P
            v = load_tokens(v_ptr + head * v_stride_h, t, v_stride_t, p, in_seq, in_p)  # [CHUNK, BLOCK_P]
            dy = load_tokens(dy_ptr + head * dy_stride_h, t, dy_stride_t, p, in_seq, in_p)  # [CHUNK, BLOCK_P]
            state_at = (slot * H + head) * N * P + n[:, None] * P + p[None, :]
            leaving = tl.load(leaving_ptr + state_at, mask=in_n[:, None] & in_p[None, :], other=0.0)
            dscaled = product(k, leaving, OPERAND) * to_end[:, None]  # gradient of scale * v
            dscaled += product(scores, dy, OPERAND)
            dscale += tl.sum(dscaled * v.to(tl.float32), axis=1)
            dv = dscaled * scale[:, None]
            dv_at = (t * H + head)[:, None] * P + p[None, :]
            tl.store(dv_ptr + dv_at, dv.to(dv_ptr.dtype.element_ty), mask=in_seq[:, None] & in_p[None, :])
        if HAS_SCALE:
            tl.store(dscale_ptr + t * H + head, dscale, mask=in_seq)


@launched(do_not_specialize=["T"])
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr,  # [BT,G,N] [BT,G,N] [BT,H,P] [BT,H,P]
    a_ptr, scale_ptr, cu_ptr, owner_ptr,  # [BT,H] [BT,H] float32; int [S+1]; int64 [slots]
    entering_ptr, leaving_ptr,  # [slots,H,N,P] float32: state that enters, gradient of the state that leaves
    dq_ptr, dk_ptr, da_ptr,  # [BT,H,N] [BT,H,N] [BT,H], float32, contiguous; one dq and dk per head
    T, q_stride_t, q_stride_g, k_stride_t, k_stride_g, v_stride_t, v_stride_h, dy_stride_t, dy_stride_h,
    H: tl.constexpr, J: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_SCALE: tl.constexpr, PACKED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One program owns one (chunk, head): dq, dk and the gradient of the log decay.

    The log decay of token t scales what crosses t: pairs i >= t > j inside the chunk, the old state read at i >= t,
    values from j < t kept to the end, the old state kept to the end. Each is summed directly: the shorter identity
    d log a_t = sum_{i>=t} (<dq_i, q_i> - <dk_i, k_i>) cancels, and small decays drown in its rounding.
    """
    slot, head, first, end = chunk_of(owner_ptr, cu_ptr, T, H, CHUNK, PACKED)
    if first < end:
        step = tl.arange(0, CHUNK)
        n = tl.arange(0, BLOCK_N)
        t = first + step
        in_seq = t < end
        in_n = n < N
        store = in_seq[:, None] & in_n[None, :]
        grad_at = (t * H + head)[:, None] * N + n[None, :]
        coarse, fine, cuts = chunk_decay(a_ptr, t, head, in_seq, H, HAS_DECAY, CHUNK)
        scale = load_scale(scale_ptr, t, head, in_seq, H, HAS_SCALE, CHUNK)
        q = load_tokens(q_ptr + head // J * q_stride_g, t, q_stride_t, n, in_seq, in_n)  # [CHUNK, BLOCK_N]
        k = load_tokens(k_ptr + head // J * k_stride_g, t, k_stride_t, n, in_seq, in_n)  # [CHUNK, BLOCK_N]

        dscores = tl.zeros([CHUNK, CHUNK], tl.float32)  # [i, j]
        dq = tl.zeros([CHUNK, BLOCK_N], tl.float32)
        kept = tl.zeros([BLOCK_N], tl.float32)
        for block in range(0, (P + BLOCK_P - 1) // BLOCK_P):
            p = block * BLOCK_P + tl.arange(0, BLOCK_P)
            in_p = p < P
            v = load_tokens(v_ptr + head * v_stride_h, t, v_stride_t, p, in_seq, in_p)  # [CHUNK, BLOCK_P]
            dy = load_tokens(dy_ptr + head * dy_stride_h, t, dy_stride_t, p, in_seq, in_p)  # [CHUNK, BLOCK_P]
            state_at = (slot * H + head) * N * P + n[:, None] * P + p[None, :]
            in_state = in_n[:, None] & in_p[None, :]
            entering = tl.load(entering_ptr + state_at, mask=in_state, other=0.0)  # [BLOCK_N, BLOCK_P]
            leaving = tl.load(leaving_ptr + state_at, mask=in_state, other=0.0)
            dscores += product(dy, tl.trans(v), OPERAND)
            dq += product(dy, tl.trans(entering), OPERAND)
            kept += tl.sum(entering * leaving, axis=1)
        dq *= decay_from_start(coarse, fine, cuts, OPERAND)[:, None]
        dscores *= pair_decay(coarse, fine, cuts, step, HAS_DECAY, False, OPERAND) * scale[None, :]
        if HAS_DECAY:
            pairs = tl.cumsum(dscores * product(q, tl.trans(k), OPERAND), axis=0, reverse=True)  # sums over i >= t
            crossing = tl.sum(tl.where(step[None, :] < step[:, None], pairs, 0.0), axis=1)
            crossing += tl.cumsum(tl.sum(dq * q.to(tl.float32), axis=1), axis=0, reverse=True)
            crossing += tl.sum(kept, axis=0) * at_end(decay_from_start(coarse, fine, cuts, OPERAND), step, CHUNK)
        dq += product(dscores, k, OPERAND)
        tl.store(dq_ptr + grad_at, dq, mask=store)

        dscores = tl.zeros([CHUNK, CHUNK], tl.float32)  # [j, i], multiplied anew: no transposed accumulator
        dk = tl.zeros([CHUNK, BLOCK_N], tl.float32)
        for block in range(0, (P + BLOCK_P - 1) // BLOCK_P):
            p = block * BLOCK_P + tl.arange(0, BLOCK_P)
            in_p = p < P
            v = load_tokens(v_ptr + head * v_stride_h, t, v_stride_t, p, in_seq, in_p)  # [CHUNK, BLOCK_P]
            dy = load_tokens(dy_ptr + head * dy_stride_h, t, dy_stride_t, p, in_seq, in_p)  # [CHUNK, BLOCK_P]
            state_at = (slot * H + head) * N * P + n[:, None] * P + p[None, :]
            leaving = tl.load(leaving_ptr + state_at, mask=in_n[:, None] & in_p[None, :], other=0.0)
            dscores += product(v, tl.trans(dy), OPERAND)
            dk += product(v, tl.trans(leaving), OPERAND)
        dk *= (decay_to_end(coarse, fine, cuts, step, CHUNK, OPERAND) * scale)[:, None]
        if HAS_DECAY:
            carried = tl.sum(dk * k.to(tl.float32), axis=1)
            crossing += tl.cumsum(carried, axis=0) - carried
            tl.store(da_ptr + t * H + head, crossing, mask=in_seq)
        dscores *= pair_decay(coarse, fine, cuts, step, HAS_DECAY, True, OPERAND) * scale[:, None]
        dk += product(dscores, q, OPERAND)
        tl.store(dk_ptr + grad_at, dk, mask=store)

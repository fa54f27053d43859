"""Jitted pieces of the semiseparable kernels: token ranges, decays inside a chunk, products."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.primitives import INTERPRETED, exponential

CUT = tl.constexpr(-104.0)  # a log decay below this one is a factor of exactly 0 in float32
GRAIN = tl.constexpr(2.0**-10)  # sums of a chunk's decays are exact in multiples of it


@triton.jit
def product(a, b, OPERAND: tl.constexpr):
    """a [M,K] @ b [K,N] in float32, operands rounded to OPERAND.

    float16 inputs come with OPERAND float16 too, but are multiplied as TF32, which holds every float16 value and the
    range of states and decayed scores that float16 does not have.
    """
    if tl.bfloat16 == OPERAND:
        if INTERPRETED:  # the interpreter cannot multiply bfloat16
            result = tl.dot(a.to(OPERAND).to(tl.float32), b.to(OPERAND).to(tl.float32), input_precision="ieee")
        else:
            result = tl.dot(a.to(OPERAND), b.to(OPERAND))
    elif tl.float16 == OPERAND:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    else:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return result


@triton.jit
def carry(state, lost, whole, written, OPERAND: tl.constexpr):
    """state * whole + written, and what rounding took from the sum, for the next call to give back.

    Kahan summation, in float32 only: without decay a state is the sum of all chunks. Half precision is far coarser.
    """
    if tl.float32 == OPERAND:
        kept = state * whole
        term = written - lost * whole
        state = kept + term
        lost = (state - kept) - term
    else:
        state = state * whole + written
    return state, lost


@triton.jit
def token_range(sequence, cu_ptr, T, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """First token, end and first chunk slot of a sequence (int64); token numbers run over the flattened batch.

    Slots: every sequence has at least as many as it has chunks, and where they begin follows from its number and
    its first token alone, so that no program has to sum the lengths before it.
    """
    if PACKED:
        start = tl.load(cu_ptr + sequence).to(tl.int64)
        end = tl.load(cu_ptr + sequence + 1).to(tl.int64)
        slot = start // CHUNK + sequence
    else:
        start = sequence * T
        end = start + T
        slot = sequence * ((T + CHUNK - 1) // CHUNK)
    return start, end, slot


@triton.jit
def load_tokens(ptr, t, stride_t, column, in_seq, in_width):
    """Tile [CHUNK, WIDTH] of a tensor whose last axis is contiguous; zeros outside."""
    return tl.load(ptr + t[:, None] * stride_t + column[None, :], mask=in_seq[:, None] & in_width[None, :], other=0.0)


@triton.jit
def chunk_decay(a_ptr, t, head, in_seq, H: tl.constexpr, HAS_DECAY: tl.constexpr, CHUNK: tl.constexpr):
    """Inclusive sums [CHUNK] of log decays: coarse (multiples of GRAIN, exact) and fine parts, without the decays that
    underflow; and how many of those there are so far."""
    if HAS_DECAY:
        a = tl.load(a_ptr + t * H + head, mask=in_seq, other=0.0)
        cut = a < CUT
        a = tl.where(cut, 0.0, a)
        grains = tl.floor(a * (1.0 / GRAIN))
        coarse = tl.cumsum(grains, axis=0) * GRAIN
        fine = tl.cumsum(a - grains * GRAIN, axis=0)
        cuts = tl.cumsum(cut.to(tl.int32), axis=0)
    else:
        coarse = tl.zeros([CHUNK], tl.float32)
        fine = tl.zeros([CHUNK], tl.float32)
        cuts = tl.zeros([CHUNK], tl.int32)
    return coarse, fine, cuts


@triton.jit
def at_end(values, step, CHUNK: tl.constexpr):
    """The last element of [CHUNK]."""
    return tl.sum(tl.where(step == CHUNK - 1, values, 0), axis=0)


@triton.jit
def decay_to_end(coarse, fine, cuts, step, CHUNK: tl.constexpr, OPERAND: tl.constexpr):
    """Factor [CHUNK] from each token to the end of the chunk; masked before the exponential."""
    difference = (at_end(coarse, step, CHUNK) - coarse) + (at_end(fine, step, CHUNK) - fine)
    return exponential(tl.where(cuts == at_end(cuts, step, CHUNK), difference, float("-inf")), tl.float32 == OPERAND)


@triton.jit
def decay_from_start(coarse, fine, cuts, OPERAND: tl.constexpr):
    """Factor [CHUNK] from before the chunk to each token; 0 after a zero factor."""
    return exponential(tl.where(cuts == 0, coarse + fine, float("-inf")), tl.float32 == OPERAND)


@triton.jit
def pair_decay(coarse, fine, cuts, step, HAS_DECAY: tl.constexpr, TRANSPOSED: tl.constexpr, OPERAND: tl.constexpr):
    """Factor from token j to token i >= j, [i,j] or, if TRANSPOSED, [j,i]; 0 above the diagonal and across a cut."""
    if TRANSPOSED:
        causal = step[None, :] >= step[:, None]
        difference = (coarse[None, :] - coarse[:, None]) + (fine[None, :] - fine[:, None])
    else:
        causal = step[:, None] >= step[None, :]
        difference = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    if HAS_DECAY:
        linked = causal & (cuts[:, None] == cuts[None, :])
        factor = exponential(tl.where(linked, difference, float("-inf")), tl.float32 == OPERAND)
    else:
        factor = causal.to(tl.float32)
    return factor


@triton.jit
def load_scale(scale_ptr, t, head, in_seq, H: tl.constexpr, HAS_SCALE: tl.constexpr, CHUNK: tl.constexpr):
    """Factor of v per token [CHUNK], 1 if there is none."""
    if HAS_SCALE:
        scale = tl.load(scale_ptr + t * H + head, mask=in_seq, other=0.0)
    else:
        scale = tl.full([CHUNK], 1.0, tl.float32)
    return scale

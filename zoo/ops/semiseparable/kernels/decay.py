"""Jitted pieces of the semiseparable kernels: token ranges, decays inside a chunk, products."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.primitives import INTERPRETED

CUT = tl.constexpr(-104.0)  # a log decay below this one is a factor of exactly 0 in float32


@triton.jit
def product(a, b, OPERAND: tl.constexpr):
    """a [M,K] @ b [K,N] in float32, operands rounded to OPERAND.

    float16 inputs come with OPERAND float16 too, but are multiplied as TF32, which holds every float16 value and the
    range of states and decayed scores that float16 does not have.
    """
    if OPERAND == tl.bfloat16:
        if INTERPRETED:  # the interpreter cannot multiply bfloat16
            result = tl.dot(a.to(OPERAND).to(tl.float32), b.to(OPERAND).to(tl.float32), input_precision="ieee")
        else:
            result = tl.dot(a.to(OPERAND), b.to(OPERAND))
    elif OPERAND == tl.float16:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    else:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return result


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
    """Inclusive sums of the log decays [CHUNK] without those that underflow, which of these are so, their running count."""
    if HAS_DECAY:
        a = tl.load(a_ptr + t * H + head, mask=in_seq, other=0.0)
        cut = a < CUT
        sums = tl.cumsum(tl.where(cut, 0.0, a), axis=0)
        cuts = tl.cumsum(cut.to(tl.int32), axis=0)
    else:
        sums = tl.zeros([CHUNK], tl.float32)
        cuts = tl.zeros([CHUNK], tl.int32)
        cut = cuts > 0
    return sums, cut, cuts


@triton.jit
def last_decay(sums, cuts, step, CHUNK: tl.constexpr):
    """Sum at the end of the chunk and the number of zero factors in it; `sums` at the last step, not a second sum."""
    at_end = step == CHUNK - 1
    return tl.sum(tl.where(at_end, sums, 0.0), axis=0), tl.sum(tl.where(at_end, cuts, 0), axis=0)


@triton.jit
def decay_to(sums, cuts, sum_end, cuts_end):
    """Factor [CHUNK] from each token to the end of the chunk; masked before the exponential."""
    return tl.exp(tl.where(cuts == cuts_end, sum_end - sums, float("-inf")))


@triton.jit
def decay_from_start(sums, cuts):
    """Factor from before the chunk to each token; 0 after a zero factor."""
    return tl.exp(tl.where(cuts == 0, sums, float("-inf")))


@triton.jit
def pair_decay(sums, cuts, step, HAS_DECAY: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Factor from token j to token i >= j, [i,j] or, if TRANSPOSED, [j,i]; 0 above the diagonal and across a cut."""
    if TRANSPOSED:
        causal = step[None, :] >= step[:, None]
        difference = sums[None, :] - sums[:, None]
    else:
        causal = step[:, None] >= step[None, :]
        difference = sums[:, None] - sums[None, :]
    if HAS_DECAY:
        linked = causal & (cuts[:, None] == cuts[None, :])
        factor = tl.exp(tl.where(linked, difference, float("-inf")))
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

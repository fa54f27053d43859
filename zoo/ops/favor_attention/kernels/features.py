"""Jitted pieces of the FAVOR+ kernels: loads, projections, features, the state."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.primitives import add_product, dot, exp
from zoo.ops.semiseparable.kernels.decay import product

LEAST = tl.constexpr(-3.4028234663852886e38)  # the running maximum without a key
PIECE = tl.constexpr(16)  # channels whose products are added up one by one in float32
LIMIT = tl.constexpr(40.0)  # most that a writer's logarithm exceeds the running maximum of its chunk


@triton.jit
def load_rows(ptr, t, stride_t, column, in_seq, in_width):
    """Tile [CHUNK, WIDTH] of a tensor whose last axis is contiguous; zeros outside."""
    return tl.load(ptr + t[:, None] * stride_t + column[None, :], mask=in_seq[:, None] & in_width[None, :], other=0.0)


@triton.jit
def load_columns(ptr, t, stride_t, column, in_seq, in_width):
    """The same tile as [WIDTH, CHUNK]."""
    return tl.load(ptr + t[None, :] * stride_t + column[:, None], mask=in_seq[None, :] & in_width[:, None], other=0.0)


@triton.jit
def project_rows(x, hi_ptr, lo_ptr, m, n, in_m, in_n, N: tl.constexpr, SPLIT: tl.constexpr):
    """<w, x'> [CHUNK, BLOCK_M] of x [CHUNK, BLOCK_N]; half precision rows w come as a sum of two, nothing is lost."""
    at = n[:, None] + m[None, :] * N
    mask = in_n[:, None] & in_m[None, :]
    dash = dot(x, tl.load(hi_ptr + at, mask=mask, other=0.0))
    if SPLIT:
        dash = dot(x, tl.load(lo_ptr + at, mask=mask, other=0.0), dash)
    return dash


@triton.jit
def project_columns(x, hi_ptr, lo_ptr, m, n, in_m, in_n, N: tl.constexpr, SPLIT: tl.constexpr):
    """<w, x'> [BLOCK_M, CHUNK] of x [BLOCK_N, CHUNK]."""
    at = n[None, :] + m[:, None] * N
    mask = in_n[None, :] & in_m[:, None]
    dash = dot(tl.load(hi_ptr + at, mask=mask, other=0.0), x)
    if SPLIT:
        dash = dot(tl.load(lo_ptr + at, mask=mask, other=0.0), x, dash)
    return dash


@triton.jit
def project_tokens(
    ptr, x, t, stride_t, hi_ptr, lo_ptr, m, n, in_seq, in_m, in_n,
    N: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """<w, x'> [CHUNK, BLOCK_M], or [BLOCK_M, CHUNK] if COLUMNS, of tokens t; x: their tile.

    In float32 piece by piece: N products added up one by one would err by several units in the last place of a
    logarithm, and so every weight.
    """
    if hi_ptr.dtype.element_ty == tl.float32:
        if COLUMNS:
            dash = tl.zeros([BLOCK_M, CHUNK], tl.float32)
        else:
            dash = tl.zeros([CHUNK, BLOCK_M], tl.float32)
        lost = tl.zeros_like(dash)
        for piece in tl.static_range(0, BLOCK_N // PIECE):
            each = piece * PIECE + tl.arange(0, PIECE)
            known = each < N
            if COLUMNS:
                w = load_projection(hi_ptr, m, each, in_m, known, N)
                dash, lost = add_product(dash, lost, w, load_columns(ptr, t, stride_t, each, in_seq, known))
            else:
                w = load_columns(hi_ptr, m, N, each, in_m, known)
                dash, lost = add_product(dash, lost, load_rows(ptr, t, stride_t, each, in_seq, known), w)
    elif COLUMNS:
        dash = project_columns(x, hi_ptr, lo_ptr, m, n, in_m, in_n, N, SPLIT)
    else:
        dash = project_rows(x, hi_ptr, lo_ptr, m, n, in_m, in_n, N, SPLIT)
    return dash


@triton.jit
def add_written(sums, lost, a, b, OPERAND: tl.constexpr):
    """sums + a @ b, and in float32 what rounding took from it: sums over all tokens would lose digits."""
    if tl.float32 == OPERAND:
        sums, lost = add_product(sums, lost, a, b)
    else:
        sums += product(a, b, OPERAND)
    return sums, lost


@triton.jit
def load_projection(hi_ptr, m, n, in_m, in_n, N: tl.constexpr):
    """Rows of the projection, [BLOCK_M, BLOCK_N], as gradients are multiplied with."""
    return tl.load(hi_ptr + m[:, None] * N + n[None, :], mask=in_m[:, None] & in_n[None, :], other=0.0)


@triton.jit
def slope_of(dash, below, scale, in_m, RELU: tl.constexpr, REVERSE: tl.constexpr):
    """Derivative [CHUNK, BLOCK_M] of a reader's features, as the sums scaled by `scale` are read.

    dash: its <w, x'>. below: |x'|^2 / 2 of a key, or the logarithm of a query's sum of weights, [CHUNK].
    """
    if RELU:
        slope = tl.where(dash > 0, 1.0, 0.0)
        if not REVERSE:
            slope *= exp(-below)[:, None]
    else:
        slope = exp(tl.where(in_m[None, :], dash - below[:, None] + scale[None, :], float("-inf")))
    return slope


@triton.jit
def half_square(x, scale, AXIS: tl.constexpr):
    """|x'|^2 / 2 of every token, in float32; scale: N^-1/2 / 2."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, axis=AXIS) * scale


@triton.jit
def place(start, length, passed, step, REVERSE: tl.constexpr):
    """Tokens [CHUNK] of the chunk after `passed` ones, in the order of the walk, and which of them exist."""
    if REVERSE:
        t = start + length - 1 - passed - step
    else:
        t = start + passed + step
    return t, passed + step < length


@triton.jit
def write(
    dash, below, present, top, step, feature_eps,
    RELU: tl.constexpr, REVERSE: tl.constexpr, AXIS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Features of a chunk's writers, and the maxima around them; tokens lie along AXIS of `dash`, their <w, x'>.

    below: what their logarithms are less than <w, x'>, [CHUNK]. top: the maximum before the chunk, [BLOCK_M].
    Returns the features below `scale`, `scale` and the maximum after the chunk, [BLOCK_M] each, and how many writers
    belong to the chunk, at least one: the features of the others are 0. ReLU features have the scale 1.
    """
    below = tl.expand_dims(below, 1 - AXIS)
    count = tl.full([], CHUNK, tl.int32)
    if RELU:
        features = tl.where(present, tl.maximum(dash, 0.0) + feature_eps, 0.0)
        if REVERSE:
            features *= exp(-below)
        scale = tl.zeros_like(top)
        leaving = scale
    else:
        along = tl.expand_dims(step, 1 - AXIS)
        log = tl.where(present, dash - below, float("-inf"))
        scale = tl.maximum(top, tl.sum(tl.where(along == 0, log, 0.0), axis=AXIS))
        excess = tl.max(log - tl.expand_dims(scale, AXIS), axis=1 - AXIS)  # [CHUNK]
        count = tl.maximum(tl.min(tl.where(excess > LIMIT, step, CHUNK), axis=0), 1)  # 0 for what is no number
        log = tl.where(along < count, log, float("-inf"))
        features = exp(log - tl.expand_dims(scale, AXIS))
        leaving = tl.maximum(scale, tl.max(log, axis=AXIS))
    return features, scale, leaving, count


@triton.jit
def load_scales(state_ptr, m, in_m, P: tl.constexpr):
    """Sums of payload scalars and maxima, [BLOCK_M] each, of a state [M,P+2]."""
    total = tl.load(state_ptr + m * (P + 2) + P, mask=in_m, other=0.0)
    top = tl.load(state_ptr + m * (P + 2) + P + 1, mask=in_m, other=0.0)
    return total, top


@triton.jit
def enter(
    state_ptr, state_at, m, p, in_m, in_p, P: tl.constexpr, HAS_FIRST: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The state before the first token: sums [BLOCK_M, BLOCK_P] (or TRANSPOSED), and two vectors [BLOCK_M]."""
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], LEAST, tl.float32)
    if TRANSPOSED:
        sums = tl.zeros([BLOCK_P, BLOCK_M], tl.float32)
    else:
        sums = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    if HAS_FIRST:  # else there is no pointer
        state_ptr += state_at
        sums = load_sums(state_ptr, m, p, in_m, in_p, P, TRANSPOSED)
        total, top = load_scales(state_ptr, m, in_m, P)
    return sums, total, top


@triton.jit
def load_sums(state_ptr, m, p, in_m, in_p, P: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Sums [BLOCK_M, BLOCK_P] (or TRANSPOSED) of a state [M,P+2]."""
    if TRANSPOSED:
        at, mask = m[None, :] * (P + 2) + p[:, None], in_m[None, :] & in_p[:, None]
    else:
        at, mask = m[:, None] * (P + 2) + p[None, :], in_m[:, None] & in_p[None, :]
    return tl.load(state_ptr + at, mask=mask, other=0.0)


@triton.jit
def leave(state_ptr, sums, total, top, m, p, in_m, in_p, P: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Store what `enter` loads."""
    if TRANSPOSED:
        at, mask = m[None, :] * (P + 2) + p[:, None], in_m[None, :] & in_p[:, None]
    else:
        at, mask = m[:, None] * (P + 2) + p[None, :], in_m[:, None] & in_p[None, :]
    tl.store(state_ptr + at, sums, mask=mask)
    tl.store(state_ptr + m * (P + 2) + P, total, mask=in_m)
    tl.store(state_ptr + m * (P + 2) + P + 1, top, mask=in_m)

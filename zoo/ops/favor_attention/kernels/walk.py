"""Jitted pieces of the causal walks in bfloat16: features as powers of 2, of writers below a scale that seldom moves.

A walk goes through runs of chunks whose places are known beforehand, so that their loads are pipelined. `scale` is
fixed inside a run: the maximum of the scale before and of the run's first writer. The first writer whose logarithm
exceeds it by more than LIMIT closes the run: it and all after it are left to the next one, which begins with it. As
before, no row depends on what comes after it: neither its scale nor the chunk it is computed in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.favor_attention.kernels.features import LEAST, enter, load_columns, place
from zoo.ops.kernels.primitives import LN2, LOG2E, dot

LIMIT2 = tl.constexpr(57.0)  # most that a writer's binary logarithm exceeds the scale: exp(40)
LOG2_LOG2E = tl.constexpr(0.5287663729448977)  # a binary logarithm's derivative is a natural one's times log(2)
HEAD = tl.constexpr(16)  # writers that are loaded for the sake of the first: a tensor core's least width


@triton.jit
def load_weights(hi_ptr, lo_ptr, m, n, in_m, in_n, N: tl.constexpr, SPLIT: tl.constexpr):
    """Rows of the projection, [BLOCK_M, BLOCK_N], and what rounding took from them if SPLIT."""
    at = m[:, None] * N + n[None, :]
    mask = in_m[:, None] & in_n[None, :]
    hi = tl.load(hi_ptr + at, mask=mask, other=0.0)
    lo = hi
    if SPLIT:
        lo = tl.load(lo_ptr + at, mask=mask, other=0.0)
    return hi, lo


@triton.jit
def origin(start, length, passed, REVERSE: tl.constexpr):
    """Token after `passed` ones in the order of the walk, and the step to the next."""
    if REVERSE:
        token, sign = start + length - 1 - passed, -1
    else:
        token, sign = start + passed, 1
    return token, sign


@triton.jit
def rows_at(ptr, token, sign, step, stride_t, column, in_seq, in_width, EVEN: tl.constexpr):
    """Tile [CHUNK, WIDTH] from `token` on; one 64-bit address, the rest are 32-bit offsets that no chunk changes.

    EVEN: no column lies outside. A mask of the whole tile would take a register for every element.
    """
    at = (step * (sign * stride_t))[:, None] + column[None, :]
    mask = in_seq[:, None]
    if not EVEN:
        mask = mask & in_width[None, :]
    return tl.load(ptr + token * stride_t + at, mask=mask, other=0.0)


@triton.jit
def columns_at(ptr, token, sign, step, stride_t, column, in_seq, in_width, EVEN: tl.constexpr):
    """The same tile as [WIDTH, CHUNK]."""
    at = (step * (sign * stride_t))[None, :] + column[:, None]
    mask = in_seq[None, :]
    if not EVEN:
        mask = mask & in_width[:, None]
    return tl.load(ptr + token * stride_t + at, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, tile, token, sign, step, column, admitted, in_width, STRIDE: tl.constexpr, EVEN: tl.constexpr):
    """The counterpart of `rows_at`."""
    at = (step * (sign * STRIDE))[:, None] + column[None, :]
    mask = admitted[:, None]
    if not EVEN:
        mask = mask & in_width[None, :]
    tl.store(ptr + token * STRIDE + at, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def dash_columns(hi, lo, x, SPLIT: tl.constexpr):
    """<w, x'> [BLOCK_M, CHUNK] of x [BLOCK_N, CHUNK]."""
    x = x.to(hi.dtype)
    dash = dot(hi, x)
    if SPLIT:
        dash = dot(lo, x, dash)
    return dash


@triton.jit
def dash_rows(hi, lo, x, SPLIT: tl.constexpr):
    """<w, x'> [CHUNK, BLOCK_M] of x [CHUNK, BLOCK_N]."""
    x = x.to(hi.dtype)
    dash = dot(x, tl.trans(hi))
    if SPLIT:
        dash = dot(x, tl.trans(lo), dash)
    return dash


@triton.jit
def multiply(a, b, acc=None):
    """a @ b (+ acc) of operands rounded to bfloat16."""
    return dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)


@triton.jit
def below_of(half_ptr, log_total_ptr, key, query, in_seq, REVERSE: tl.constexpr):
    """What the binary logarithms of the writers' features are less than <w, x'>; key, query: places in both arrays.

    Infinity, features of 0, for tokens that do not exist.
    """
    if REVERSE:
        below = tl.load(log_total_ptr + query, mask=in_seq, other=float("inf")) * LOG2E
    else:
        below = tl.load(half_ptr + key, mask=in_seq, other=float("inf"))
    return below


@triton.jit
def first_writer(
    writer_ptr, half_ptr, log_total_ptr, hi, lo, start, length, passed, head, n, in_m, in_n, stride_t,
    H: tl.constexpr, J_KEY: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Binary logarithms of the features of the writer after `passed` ones, [BLOCK_M]; LEAST for features beyond M."""
    step = tl.arange(0, HEAD)
    t, in_seq = place(start, length, passed, step, REVERSE)
    x = load_columns(writer_ptr, t, stride_t, n, in_seq, in_n)
    below = below_of(half_ptr, log_total_ptr, t * (H // J_KEY) + head // J_KEY, t * H + head, in_seq, REVERSE)
    log = dash_columns(hi, lo, x, SPLIT) - below[None, :]
    return tl.where(in_m, tl.sum(tl.where(step[None, :] == 0, log, 0.0), axis=1), LEAST)


@triton.jit
def admit(excess, step, chunk, left, is_open, CHUNK: tl.constexpr):
    """How many writers of a chunk belong to the run, and whether it goes on.

    excess: what their logarithms exceed the scale by, [CHUNK]. chunk: its number in the run, whose first writer belongs
    to it even if it is no number. left: those that exist. is_open: 0 if the run has ended.
    """
    count = tl.min(tl.where(excess > LIMIT2, step, CHUNK), axis=0)
    count = tl.where(chunk == 0, tl.maximum(count, 1), count) * is_open
    return tl.minimum(count, left), tl.where(count == CHUNK, 1, 0)


@triton.jit
def enter_walk(
    state_ptr, state_at, m, p, in_m, in_p, P: tl.constexpr, HAS_FIRST: tl.constexpr, TRANSPOSED: tl.constexpr,
    RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`enter`, with the maximum as a binary logarithm."""
    sums, total, top = enter(state_ptr, state_at, m, p, in_m, in_p, P, HAS_FIRST, TRANSPOSED, BLOCK_M, BLOCK_P)
    if RELU:
        top = tl.zeros([BLOCK_M], tl.float32)
    else:
        top = tl.maximum(top * LOG2E, LEAST)
    return sums, total, top


@triton.jit
def natural(top, RELU: tl.constexpr):
    """A maximum as the state has it."""
    if RELU:
        shown = tl.zeros_like(top)
    else:
        shown = tl.where(top <= LEAST, LEAST, top * LN2)
    return shown

"""Jitted pieces of the lean walks, in bfloat16: positive features, heads of 128 channels.

The walks of `walk` with tiles that hardly spill. What is added to <w, x'> on the way to a logarithm comes from the
tensor cores: LANES columns stand beside the projection, and LANES numbers beside every token. Strides between tokens
are constants. A run ends its loop where it is closed. Two programs of a multiprocessor walk one head, and find each
other's tiles in its L1 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.favor_attention.kernels.walk import HEAD, LIMIT2
from zoo.ops.kernels.primitives import INTERPRETED, dot

LANES = tl.constexpr(16)  # columns beside the width of a head: a tensor core's least depth
NONE = tl.constexpr(-1e38)  # binary logarithm of a feature that does not exist


@triton.jit
def seat(width, parts, SHARE: tl.constexpr):
    """Which (sequence, head) this program owns, and which part of its features.

    width: multiprocessors. The SHARE programs of one, `width` apart, have parts of one head and read the same tiles.
    """
    at = tl.program_id(0)
    per_head = parts // SHARE
    group = at // (SHARE * width) * width + at % width
    return group // per_head, group % per_head * SHARE + at // width % SHARE


@triton.jit
def rows_of(passed, length, step, STRIDE: tl.constexpr, REVERSE: tl.constexpr):
    """Where a chunk begins and how far its tokens lie from there, [CHUNK], in steps of STRIDE: int64.

    STRIDE is a constant, so that a thread forms one address for a tile and reaches the rest of it from there.
    """
    if REVERSE:
        begin, away = (length - 1 - passed).to(tl.int64) * STRIDE, step.to(tl.int64) * -STRIDE
    else:
        begin, away = passed.to(tl.int64) * STRIDE, step.to(tl.int64) * STRIDE
    return begin, away


@triton.jit
def tile(ptr, passed, length, step, column, in_seq, STRIDE: tl.constexpr, REVERSE: tl.constexpr):
    """Rows [CHUNK, WIDTH] of a sequence that begins at `ptr`, after `passed` ones in the order of the walk."""
    begin, away = rows_of(passed, length, step, STRIDE, REVERSE)
    return tl.load(ptr + begin + (away[:, None] + column[None, :]), mask=in_seq[:, None], other=0.0)


@triton.jit
def columns(ptr, passed, length, step, column, in_seq, STRIDE: tl.constexpr, REVERSE: tl.constexpr):
    """The same tile as [WIDTH, CHUNK]."""
    begin, away = rows_of(passed, length, step, STRIDE, REVERSE)
    return tl.load(ptr + begin + (away[None, :] + column[:, None]), mask=in_seq[None, :], other=0.0)


@triton.jit
def fetch(ptr, passed, length, step, CHUNK: tl.constexpr, STRIDE: tl.constexpr, REVERSE: tl.constexpr):
    """Ask for the next chunk of rows of 128 numbers, two lines each, on their way to the L2 cache."""
    if not INTERPRETED:
        ahead = tl.where(step + CHUNK < length - passed, step + CHUNK, 0)
        begin, away = rows_of(passed, length, ahead, STRIDE, REVERSE)
        at = ptr + begin + (away[:, None] + (tl.arange(0, 2) * 64)[None, :])
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [at.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def three(x):
    """x as a sum of three bfloat16 numbers, whose products with 1 a tensor core adds up."""
    hi = x.to(tl.bfloat16).to(tl.float32)
    mid = (x - hi).to(tl.bfloat16).to(tl.float32)
    return hi, mid, x - hi - mid


@triton.jit
def beside_weights(scale, ROWS: tl.constexpr):
    """What stands beside the projection, [BLOCK_M, LANES] (ROWS) or [LANES, BLOCK_M].

    1 for what belongs to tokens, then -scale, in three parts each: a product with `beside_at` adds -below - scale to a
    writer's <w, x'>, or -below + scale to a reader's.
    """
    lane = tl.arange(0, LANES)
    hi, mid, lo = three(scale)
    if ROWS:
        lane, hi, mid, lo = lane[None, :], hi[:, None], mid[:, None], lo[:, None]
    else:
        lane, hi, mid, lo = lane[:, None], hi[None, :], mid[None, :], lo[None, :]
    parts = tl.where(lane == 3, hi, tl.where(lane == 4, mid, tl.where(lane == 5, lo, 0.0)))
    return tl.where(lane < 3, 1.0, -parts).to(tl.bfloat16)


@triton.jit
def beside_readers(CHUNK: tl.constexpr):
    """[CHUNK, LANES] of readers from which nothing is to be taken: + scale."""
    lane = tl.arange(0, LANES)[None, :] + tl.zeros([CHUNK, 1], tl.int32)
    return tl.where((lane >= 3) & (lane < 6), -1.0, 0.0).to(tl.bfloat16)


@triton.jit
def beside_at(
    ptr, passed, length, step, in_seq,
    HEADS: tl.constexpr, READS: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """[CHUNK, LANES] (ROWS) or [LANES, CHUNK] of a chunk, from an array [T,HEADS,LANES].

    Tokens that do not exist have no features. READS: for readers, whose scale is added.
    """
    lane = tl.arange(0, LANES)
    if ROWS:
        part = tile(ptr, passed, length, step, lane, in_seq, HEADS * LANES, REVERSE)
        lane, known = lane[None, :], in_seq[:, None]
    else:
        part = columns(ptr, passed, length, step, lane, in_seq, HEADS * LANES, REVERSE)
        lane, known = lane[:, None], in_seq[None, :]
    if READS:
        part = part.to(tl.float32)
        part = tl.where((lane < 3) | (lane > 5), part, -part)
    return tl.where(known | (lane > 0), part, NONE).to(tl.bfloat16)


@triton.jit
def less_delta(reader, writer_ptr, passed, length, step, in_seq, HEADS: tl.constexpr, REVERSE: tl.constexpr):
    """-delta of the queries among a chunk's readers and writers, [readers,writers]; reader: `beside_at` in rows."""
    writer = columns(writer_ptr, passed, length, step, tl.arange(0, LANES), in_seq, HEADS * LANES, REVERSE)
    lane = tl.arange(0, LANES)[None, :]
    return dot(tl.where(lane > 5, reader.to(tl.float32), 0.0).to(tl.bfloat16), writer)


@triton.jit
def dash_columns_of(weights, beside_w, x, beside_x):
    """Binary logarithms of features, [BLOCK_M, CHUNK], of x [N, CHUNK]; beside_w [BLOCK_M, LANES]."""
    return dot(weights, x.to(weights.dtype), dot(beside_w, beside_x))


@triton.jit
def dash_rows_of(weights, beside_w, x, beside_x):
    """The same as [CHUNK, BLOCK_M], of x [CHUNK, N]; beside_w [LANES, BLOCK_M]."""
    return dot(x.to(weights.dtype), tl.trans(weights), dot(beside_x, beside_w))


@triton.jit
def features_of(log, step, left, is_first, AXIS: tl.constexpr, CHUNK: tl.constexpr):
    """Features of a chunk's writers from binary logarithms over a scale, their maxima, and how many writers count.

    log: tokens lie along AXIS. Maxima: of the features if AXIS is 1, else of the tokens.
    left: tokens that exist. is_first: whether the chunk begins a run; its first writer counts then, even if it is no
    number.
    """
    peak = tl.max(log, axis=1)
    count = left
    if tl.max(peak, axis=0) > LIMIT2:
        count = tl.min(tl.where(tl.max(log, axis=1 - AXIS) > LIMIT2, step, CHUNK), axis=0)
        count = tl.minimum(tl.where(is_first, tl.maximum(count, 1), count), left)
        log = tl.where(tl.expand_dims(step, 1 - AXIS) < count, log, float("-inf"))
        peak = tl.max(log, axis=1)
    return tl.exp2(log), peak, count


@triton.jit
def first_writer(
    writer_ptr, beside_ptr, weights, unscaled, length, passed, n,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Binary logarithms of the features of the writer after `passed` ones, [BLOCK_M]; unscaled: zeros of that shape."""
    step = tl.arange(0, HEAD)
    in_seq = step < length - passed
    x = columns(writer_ptr, passed, length, step, n, in_seq, STRIDE, REVERSE)
    beside_x = beside_at(beside_ptr, passed, length, step, in_seq, HEADS, False, False, REVERSE)
    log = dash_columns_of(weights, beside_weights(unscaled, True), x, beside_x)
    return tl.sum(tl.where(step[None, :] == 0, log, 0.0), axis=1)

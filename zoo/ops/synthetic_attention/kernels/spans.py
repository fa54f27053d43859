"""What every kernel here asks first: which tile of which sequence it owns, and parts of logits by position."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.primitives import dot, exponential
from zoo.ops.softmax_attention.kernels.weights import shared_out


@triton.jit
def span(spans_ptr, s, in_use):
    """First query, number of queries, first key, number of keys of sequence s, and the position of its first query."""
    q_first = tl.load(spans_ptr + s * 5, mask=in_use, other=0)
    q_length = tl.load(spans_ptr + s * 5 + 1, mask=in_use, other=0)
    k_first = tl.load(spans_ptr + s * 5 + 2, mask=in_use, other=0)
    k_length = tl.load(spans_ptr + s * 5 + 3, mask=in_use, other=0)
    offset = tl.load(spans_ptr + s * 5 + 4, mask=in_use, other=0)
    return q_first, q_length, k_first, k_length, offset


@triton.jit
def load_rows(at, row, stride_t, lanes, WIDTH: tl.constexpr, in_rows):
    """Rows of one head of one sequence: at + row * stride_t, [rows, lanes], 0 outside."""
    return tl.load(
        at + row[:, None] * stride_t + lanes[None, :], mask=in_rows[:, None] & (lanes < WIDTH)[None, :], other=0.0
    )


@triton.jit
def normalised(logits, lse, share_ptr, at, in_rows, ALONG: tl.constexpr):
    """Softmax weights of a tile of logits, -inf where hidden, of which queries lie along axis ALONG; lse is theirs."""
    weights = exponential(logits - tl.expand_dims(lse, 1 - ALONG), share_ptr.dtype.element_ty == tl.float32)
    return shared_out(weights, share_ptr, at, in_rows, ALONG)


@triton.jit
def picks(chosen, like):
    """1 where a condition holds and 0 elsewhere, in the dtype of `like`."""
    return tl.where(chosen, 1.0, 0.0).to(like.dtype)


@triton.jit
def outer_logits(left, right, j, COLUMNS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr):
    """left[:, j // COLUMNS] and right[:, j % COLUMNS] of queries: [queries, keys] each, exact, float32.

    A product with a matrix of zeros and ones picks the columns, on tensor cores in half precision.
    """
    pick_left = picks(tl.arange(0, BLOCK_A)[:, None] == (j // COLUMNS)[None, :], left)
    pick_right = picks(tl.arange(0, BLOCK_C)[:, None] == (j % COLUMNS)[None, :], right)
    return dot(left, pick_left), dot(right, pick_right)


@triton.jit
def outer_logits_by_key(left, right, j, COLUMNS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr):
    """The same with keys as rows: [keys, queries] each."""
    pick_left = picks((j // COLUMNS)[:, None] == tl.arange(0, BLOCK_A)[None, :], left)
    pick_right = picks((j % COLUMNS)[:, None] == tl.arange(0, BLOCK_C)[None, :], right)
    return dot(pick_left, tl.trans(left)), dot(pick_right, tl.trans(right))

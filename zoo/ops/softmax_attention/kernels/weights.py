"""Weights from logits. Logits are to base e in float32 and to base 2 in half precision, whose exponents are then free.

In float32 the rounding of logits times log2(e) would show.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from zoo.ops.kernels.primitives import exp


def logit_scale(scale: float, dtype: torch.dtype) -> float:
    """What products of queries and keys of this dtype are multiplied by."""
    return scale if dtype == torch.float32 else scale * math.log2(math.e)


@triton.jit
def powers(x, q_ptr):
    """The base to the power x."""
    if q_ptr.dtype.element_ty == tl.float32:
        made = exp(x)
    else:
        made = tl.exp2(x)
    return made


@triton.jit
def log_of(x, q_ptr):
    """The logarithm of x to that base."""
    if q_ptr.dtype.element_ty == tl.float32:
        made = tl.log(x)
    else:
        made = tl.log2(x)
    return made


@triton.jit
def shared_out(weights, share_ptr, at, in_rows, ALONG: tl.constexpr):
    """Exponentials of logits less their log-sum-exp, made to sum to 1; queries lie along axis ALONG of the tile.

    The rounding of the log-sum-exp is an error that all weights of a query have in common. In float32 it goes out
    again: share is 1 over the sum of the weights that have it. Half precision does without, and share_ptr is any
    pointer to that dtype.
    """
    if share_ptr.dtype.element_ty == tl.float32:
        weights *= tl.expand_dims(tl.load(share_ptr + at, mask=in_rows, other=0.0), 1 - ALONG)
    return weights

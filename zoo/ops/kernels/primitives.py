"""Jitted pieces shared by the kernels of several operators."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter returns garbage for bfloat16 `tl.dot`; products are done on float32 copies there.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, acc=None):
    """a [M,K] @ b [K,N] (+ acc) with a float32 accumulator; float32 operands are multiplied in IEEE precision."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def add_product(total, lost, a, b):
    """total + a [M,K] @ b [K,N], and what rounding took from it: the next call gives it back (Kahan summation).

    Only float32 operands are worth it, in a sum of many products; half precision is added up by the tensor cores.
    """
    if a.dtype == tl.float32:
        term = dot(a, b) - lost
        grown = total + term
        lost = (grown - total) - term
        total = grown
    else:
        total = dot(a, b, total)
    return total, lost

"""Jitted pieces shared by the kernels of several operators."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter returns garbage for bfloat16 `tl.dot`; products are done on float32 copies there.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2E = tl.constexpr(1.4426950216293335)  # log2(e) in float32
LOG2E_REST = tl.constexpr(1.9259629911266175e-8)  # what float32 leaves of it
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc=None):
    """a [M,K] @ b [K,N] (+ acc) with a float32 accumulator; float32 operands are multiplied in IEEE precision."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def exp(x):
    """e^x to the accuracy of float32: the rounding of x log2(e) alone is an error that grows with x."""
    high = x * LOG2E
    low = tl.fma(x, LOG2E, -high) + x * LOG2E_REST
    return tl.exp2(high) * (1.0 + tl.where(tl.abs(high) < 200.0, low, 0.0) * LN2)


@triton.jit
def exponential(x, EXACT: tl.constexpr):
    """e^x. EXACT, for float32 operands: `exp`; else as the hardware gives it.

    `exp` in half precision makes LLVM's vectoriser abort on the gradients of the semiseparable scan (Triton 3.6).
    """
    if EXACT:
        result = exp(x)
    else:
        result = tl.exp2(x * LOG2E)
    return result


@triton.jit
def quotient(a, b, EXACT: tl.constexpr):
    """a / b, correctly rounded if EXACT: the usual quotient is off by up to 2 units in the last place."""
    if EXACT:
        result = tl.div_rn(a, b)
    else:
        result = a / b
    return result


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    """1 / (1 + e^-x), float32; EXACT as in `exponential`."""
    return quotient(1.0, 1.0 + exponential(-x, EXACT), EXACT)


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

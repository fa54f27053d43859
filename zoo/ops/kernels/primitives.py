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
def power(x, OPERAND: tl.constexpr):
    """e^x for x <= 0: to the accuracy of float32 where operands are float32, else as the hardware gives it."""
    if tl.float32 == OPERAND:
        result = exp(x)
    else:
        result = tl.exp2(x * LOG2E)
    return result


@triton.jit
def sigmoid(x, OPERAND: tl.constexpr):
    """1 / (1 + e^-x), float32: to its accuracy where operands are float32, else as the hardware gives it."""
    if tl.float32 == OPERAND:
        result = tl.div_rn(1.0, 1.0 + exp(-x))
    else:
        result = tl.sigmoid(x)
    return result


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

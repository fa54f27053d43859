"""Complex exponentials in float64 without a branch.

The library's sine and cosine hold a slow path for angles beyond 1e5 that takes thousands of bytes of stack from every
thread. Here pi/2 is taken away in three pieces, the first two of 33 bits, so that up to 2^20 quarter turns the products
are exact and what is left is right to 1e-16; the series end below 1e-17.
"""

from __future__ import annotations

import triton
import triton.language as tl

QUARTERS = tl.constexpr(0.6366197723675814)  # 2 / pi
PIECE_1 = tl.constexpr(1.57079632673412561417)  # pi / 2 = the sum of the pieces
PIECE_2 = tl.constexpr(6.07710050630396597660e-11)
PIECE_3 = tl.constexpr(2.02226624879595063154e-21)


@triton.jit
def _series(square, ODD: tl.constexpr):
    """1 - r^2 / (n+1)(n+2) (1 - r^2 / (n+3)(n+4) (...)): cos r, and sin r / r if ODD, for |r| <= pi / 4."""
    value = square * 0.0 + 1.0
    for step in tl.static_range(9):
        value = 1.0 - square * (1.0 / ((17 - 2 * step + ODD) * (18 - 2 * step + ODD))) * value
    return value


@triton.jit
def exponential(rate, turn, count):
    """e^{count (rate + i turn)}, float64, real and imaginary parts; the arguments are broadcast."""
    angle = turn * count
    quarter = tl.floor(angle * QUARTERS + 0.5)
    rest = ((angle - quarter * PIECE_1) - quarter * PIECE_2) - quarter * PIECE_3
    square = rest * rest
    sine = rest * _series(square, 1)
    cosine = _series(square, 0)
    side = quarter - 4.0 * tl.floor(quarter * 0.25)
    odd = (side == 1.0) | (side == 3.0)
    re = tl.where(odd, sine, cosine)
    im = tl.where(odd, cosine, sine)
    re = tl.where((side == 1.0) | (side == 2.0), -re, re)
    im = tl.where((side == 2.0) | (side == 3.0), -im, im)
    size = tl.exp(rate * count)
    return size * re, size * im

"""Sums over the diagonals of a tile: how the gradient of a Toeplitz tile's taps is made of products of its pairs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def diagonal_sums(pairs, SIZE: tl.constexpr):
    """Sums of pairs [SIZE,SIZE] over i - j = e and over i - j = e - SIZE, for e = 0 .. SIZE - 1."""
    step = tl.arange(0, SIZE)
    apart = step[:, None] - step[None, :]  # [i, e]
    turned = tl.gather(pairs, (apart + SIZE) % SIZE, 1)  # pairs[i, i - e], around the end
    return tl.sum(tl.where(apart >= 0, turned, 0.0), axis=0), tl.sum(tl.where(apart >= 0, 0.0, turned), axis=0)

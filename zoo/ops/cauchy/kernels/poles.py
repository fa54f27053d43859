"""What the forward and the backward of the Cauchy sums share: the reciprocals of the distances to a pair of poles."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_K = 128  # nodes of a program, or of a step


@triton.jit
def load_pairs(ptr, at, mask, OTHER: tl.constexpr):
    """Real and imaginary parts at `at`, in float64."""
    re = tl.load(ptr + at * 2, mask=mask, other=OTHER).to(tl.float64)
    im = tl.load(ptr + at * 2 + 1, mask=mask, other=0.0).to(tl.float64)
    return re, im


@triton.jit
def load_nodes(z_ptr, q_ptr, k, in_k, HAS_Q: tl.constexpr):
    """Nodes z and factors q as four [BLOCK_K] parts, in float64; z = 1 and q = 0 outside, which no pole meets."""
    z_re, z_im = load_pairs(z_ptr, k, in_k, 1.0)
    if HAS_Q:
        q_re, q_im = load_pairs(q_ptr, k, in_k, 0.0)
    else:
        q_re = tl.where(in_k, 1.0, 0.0).to(tl.float64)
        q_im = q_re * 0.0
    return z_re, z_im, q_re, q_im


@triton.jit
def reciprocals(z_re, z_im, q_re, q_im, w_re, w_im):
    """a = 1 / (z - q w) and b = 1 / (z - q conj(w)), as (re, im) each, with one division for both."""
    rr, ii, ri, ir = q_re * w_re, q_im * w_im, q_re * w_im, q_im * w_re
    a_re, a_im = z_re - (rr - ii), z_im - (ri + ir)
    b_re, b_im = z_re - (rr + ii), z_im - (ir - ri)
    a_norm = a_re * a_re + a_im * a_im
    b_norm = b_re * b_re + b_im * b_im
    inverse = 1.0 / (a_norm * b_norm)
    by_a, by_b = b_norm * inverse, a_norm * inverse
    return a_re * by_a, -a_im * by_a, b_re * by_b, -b_im * by_b

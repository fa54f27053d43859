"""Time steps of a selective recurrence inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.primitives import exp


@triton.jit
def softplus(x):
    """log(1 + e^x), float32, without a threshold.

    The digits of small results stay: log(1 + u) = 2 atanh(s) with s = u / (2 + u) in (0, 1/3], as a series.
    """
    u = exp(-tl.abs(x))
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 / 13.0 + q * (1.0 / 15.0)
    series = 1.0 / 11.0 + q * series
    series = 1.0 / 9.0 + q * series
    series = 1.0 / 7.0 + q * series
    series = 1.0 / 5.0 + q * series
    series = 1.0 / 3.0 + q * series
    return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + q * series)

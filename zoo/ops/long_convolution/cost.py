"""FLOPs of the long convolution."""

from __future__ import annotations

import math

CHUNK = 64


def flops(batch: int, tokens: int, channels: int, taps: int, *, direct: bool = False) -> int:
    """FLOPs of the forward, 2 per multiply-add.

    taps: of both kernels together, those that reach a token.
    direct: the Toeplitz product in chunks of 64, 2 B T D (taps + 64); else transforms of n >= T + taps - 1 real numbers
        at 2.5 n log2 n each (B D inputs, as many outputs, D kernels) and 6 per product of two complex numbers.
    """
    if direct:
        return 2 * batch * tokens * channels * (taps + min(CHUNK, tokens))
    n = max(2, tokens + taps - 1)
    transform = int(2.5 * n * math.log2(n))
    return channels * ((2 * batch + 1) * transform + 6 * batch * (n // 2 + 1))

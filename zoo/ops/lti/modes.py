"""Powers of complex modes, kept as real pairs and taken in float64.

A phase l Im log_a of many turns keeps too few digits in float32: at l = 16,384 its error is 1e-3. Tables of powers are
small beside the inputs, so they are made in float64 whatever the inputs are, and rounded once.
"""

from __future__ import annotations

from torch import Tensor


def power(log_a: Tensor, lag: Tensor | int) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of e^{lag log_a}, float64, [...]: log_a [...,2], lag broadcast against [...]."""
    rate, turn = log_a.double().unbind(-1)
    size = (lag * rate).exp()
    angle = lag * turn
    return size * angle.cos(), size * angle.sin()


def powers(log_a: Tensor, lags: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of modes log_a [D,M,2] at all lags [K]: two float64 tensors [D,M,K]."""
    return power(log_a.unsqueeze(-2), lags.double())


def times(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Complex product of (re, im) pairs."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]

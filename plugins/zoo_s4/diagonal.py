"""S4D's system: every pair of modes on its own, discretised in float64 without losing digits at small time steps."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 1e-3  # |z| below which (e^z - 1) / z is summed as a series: five terms leave z^5 / 720
FAINT = 1e-30  # |1 + z/2| below which the bilinear factor counts as this small: its logarithm is finite


def discretise(dt: Tensor, a: Tensor, B: Tensor, disc: str) -> tuple[Tensor, Tensor]:
    """Logarithm of the factor A' of a token, and the input weight B', both complex128 [D,N/2].

    dt: float64 [D,1] or [D,N/2]. a: complex128 [D,N/2], Re a < 0. B: complex128 [D,N/2].
    disc: "zoh", A' = e^z and B' = B (e^z - 1) / a with z = dt a; or "bilinear", A' = (1 + z/2) / (1 - z/2) and
        B' = B dt / (1 - z/2). Both are finite at z = 0, and bilinear at z = -2, where A' is 0.
    """
    z = dt * a
    if disc == "zoh":
        return z, B * dt * growth(z)
    above = 1 + z / 2
    above = torch.where(above.abs() < FAINT, above + FAINT, above)
    below = 1 - z / 2
    return above.log() - below.log(), B * dt / below


def growth(z: Tensor) -> Tensor:
    """(e^z - 1) / z for complex z."""
    near = z.abs() < SMALL
    safe = torch.where(near, torch.ones_like(z), z)
    half, third, quarter, fifth = (1.0 / k * z for k in (2, 3, 4, 5))  # complex division is ten times as slow
    series = 1 + half * (1 + third * (1 + quarter * (1 + fifth)))
    return torch.where(near, series, expm1(safe) / safe)


def expm1(z: Tensor) -> Tensor:
    """e^z - 1 for complex z, exact to rounding where z is small."""
    a, b = z.real, z.imag
    return torch.complex(torch.expm1(a) * b.cos() - 2 * (b / 2).sin() ** 2, a.exp() * b.sin())

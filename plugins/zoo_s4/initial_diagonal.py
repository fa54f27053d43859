"""Diagonals that imitate HiPPO matrices, and other initial values by formula.

Source: Gu et al. 2022, arXiv 2206.11893; state-spaces/s4, kernels/dplr.py. Everything here is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo_s4.config import DIAGONALS
from zoo_s4.hippo import Initial


@dataclass(frozen=True)
class Draw:
    """How a diagonal is varied; the fields mean what those of `StateSpaceConfig` and `S4Config` say."""

    real_scale: float = 1.0
    imag_scale: float = 1.0
    real_random: bool = False
    imag_random: bool = False
    b_init: str = "constant"
    b_scale: float = 1.0
    p_scale: float = 1.0
    normalize: bool = False


def initial_diagonal(name: str, width: int, rank: int, draw: Draw | None = None) -> Initial:
    """One system of N = `width` states: a, B [N/2] and P [R,N/2], complex normal. Draws from torch's generator.

    Re a = -1/2 but for `real`, where a = -(n + 1). Raises ValueError for a name that is no diagonal.
    """
    draw, half = draw or Draw(), width // 2
    n = half * torch.rand(half, dtype=torch.float64) if draw.imag_random else torch.arange(half, dtype=torch.float64)
    real = torch.rand(half, dtype=torch.float64) if draw.real_random else torch.full((half,), 0.5, dtype=torch.float64)
    if name == "real":
        real = half * real if draw.real_random else torch.arange(1, half + 1, dtype=torch.float64)
    a = torch.complex(-draw.real_scale * real, -draw.imag_scale * frequencies(name, n, width))
    B = draw.b_scale * input_weights(draw.b_init, width)
    if draw.normalize:  # 2 sum |B/a|^2 is the variance of the sum of a kernel with a complex normal C
        B = B / (2 * (B / a).abs().square().sum()).sqrt()
    return Initial(a, draw.p_scale * torch.randn(rank, half, dtype=torch.complex128), B)


def frequencies(name: str, n: Tensor, width: int) -> Tensor:
    """-Im a of the pairs n, numbers in [0, N/2), in radians per unit of time."""
    if name == "lin":
        return math.pi * n
    if name == "inv":
        return (width / math.pi * (width / (2 * n + 1) - 1)).clamp(min=0)  # n beyond (N - 1) / 2 would turn back
    if name == "inv2":
        return width / math.pi * (width / (n + 1) - 1)
    if name == "quad":
        return (2 * n + 1) ** 2 / math.pi
    if name == "real":
        return torch.zeros_like(n)
    if name == "rand":
        return torch.randn_like(n).exp()
    raise ValueError(f"no diagonal {name!r}; there are: {', '.join(DIAGONALS)}")


def input_weights(kind: str, width: int) -> Tensor:
    """B [N/2], complex: ones, complex normal, +-1 in turn, or e^(-+ 2 pi i n / N)."""
    n = torch.arange(width // 2, dtype=torch.float64)
    one = torch.ones_like(n)
    if kind == "random":
        return torch.randn(n.shape, dtype=torch.complex128)
    if kind in ("unit-cw", "unit-ccw"):
        return torch.polar(one, (-1 if kind == "unit-cw" else 1) * 2 * math.pi / width * n)
    return torch.complex(1 - 2 * (n % 2) if kind == "alternating" else one, 0 * n)

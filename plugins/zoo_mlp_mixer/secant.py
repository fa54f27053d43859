"""The slope of the secant of a GELU between a bias and a bias plus something, which makes a token MLP a matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def secant_slope(z: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """(gelu(bias + z) - gelu(bias)) / z, and its limit, the derivative, where z is 0; shapes broadcast.

    Without a bias this is gelu(z) / z = Phi(z). Around 0, where the quotient cancels, it is the derivative in the
    middle of the interval, whose error is of second order in z. Computed and returned in the accumulation dtype.
    """
    wide = accumulation_dtype(z.dtype)
    z, bias = z.to(wide), bias.to(wide)
    near = z.abs() < torch.finfo(wide).eps ** (1 / 3)
    divisor = torch.where(near, 1, z)
    quotient = (F.gelu(bias + z, approximate=approximate) - F.gelu(bias, approximate=approximate)) / divisor
    return torch.where(near, gelu_slope(bias + z / 2, approximate), quotient)


def gelu_slope(a: Tensor, approximate: str) -> Tensor:
    """Derivative of the GELU."""
    slope: Tensor = torch.ops.aten.gelu_backward(torch.ones_like(a), a, approximate=approximate)
    return slope

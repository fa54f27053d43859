"""The definition of the token MLP."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def token_mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, tanh: bool
) -> Tensor:
    """x [B,T,D], w1 [E,T], w2 [T,E], all in one dtype -> y [B,T,D]; differentiable any number of times."""
    wide = accumulation_dtype(x.dtype)
    hidden = torch.einsum("et,btd->bed", w1.to(wide), x.to(wide))
    if b1 is not None:
        hidden = hidden + b1.to(wide)[:, None]
    y = torch.einsum("te,bed->btd", w2.to(wide), gelu(hidden, tanh))
    if b2 is not None:
        y = y + b2.to(wide)[:, None]
    return y.to(x.dtype)


def gelu(a: Tensor, tanh: bool) -> Tensor:
    """a Phi(a), or its approximation with a hyperbolic tangent."""
    if tanh:
        return a / 2 * (1 + (math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)).tanh())
    return a / 2 * (1 + (a / math.sqrt(2)).erf())

"""Time steps of a selective recurrence from their raw values."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def time_step(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """clamp(softplus(dt + dt_bias)) in `dtype`, [B,T,H]. dt: [B,T,H]. dt_bias: [H].

    softplus is log(e^x + e^0) in a form that keeps the digits of small steps and has no threshold. Steps outside
    `dt_limit` have no gradient.
    """
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = torch.logaddexp(dt, torch.zeros_like(dt))
        if tuple(dt_limit) == (0.0, math.inf):
            return dt
    return dt.clamp(dt_limit[0], dt_limit[1])

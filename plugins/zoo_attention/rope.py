"""Rotary positions: pairs of channels are turned by an angle that grows with the token's position."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def rotate(x: Tensor, positions: Tensor, *, pairing: str, base: float) -> Tensor:
    """Turn pair r of each head by positions * base^(-2r/P), so that <q_i, k_j> depends on i - j.

    x: [B,T,H,P], P even. positions: int64 [T] or [B,T]. pairing: "half" (r with r + P/2) or "interleaved" (2r with
    2r + 1). Returns x turned, in its dtype; angles are float64, since a float32 frequency is off by 3e-3 rad at
    position 131,071, and the turn itself has the accumulation dtype. Source: Su et al. 2021, equation 34.
    """
    width, wide = x.shape[-1], accumulation_dtype(x.dtype)
    exponent = torch.arange(0, width, 2, device=x.device, dtype=torch.float64) / -width
    angles = (positions.unsqueeze(-1) * torch.pow(base, exponent)).unsqueeze(-2)  # [T,1,P/2] or [B,T,1,P/2]
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    if pairing == "half":
        first, second = x.to(wide).chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    else:
        first, second = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    return turned.to(x.dtype)

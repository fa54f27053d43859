"""Gated RMS norm in plain PyTorch: whole rows, groups as an axis of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def gated_rms_norm_chunked(
    x: Tensor, z: Tensor | None, weight: Tensor, *, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """Arguments and result of `gated_rms_norm`, with a group size."""
    acc = accumulation_dtype(x.dtype)
    value = x.to(acc)
    gate = None if z is None else F.silu(z.to(acc))
    if gate is not None and not norm_before_gate:
        value = value * gate
    grouped: Tensor = value.unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    value = (grouped * scale).flatten(-2) * weight.to(acc)
    if gate is not None and norm_before_gate:
        value = value * gate
    return value.to(x.dtype)

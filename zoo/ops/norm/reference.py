"""The definition of the gated RMS norm, one group of channels at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def gated_rms_norm_reference(
    x: Tensor, z: Tensor | None, weight: Tensor, *, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """Arguments and result of `gated_rms_norm`, with a group size."""
    acc = accumulation_dtype(x.dtype)
    groups = []
    for first in range(0, x.shape[-1], group_size):
        own = slice(first, first + group_size)
        value = x[..., own].to(acc)
        gate = torch.ones_like(value)
        if z is not None:
            gate = z[..., own].to(acc) * torch.sigmoid(z[..., own].to(acc))
        if not norm_before_gate:
            value = value * gate
        value = value / torch.sqrt((value * value).mean(-1, keepdim=True) + eps) * weight[own].to(acc)
        groups.append(value * gate if norm_before_gate else value)
    return torch.cat(groups, -1).to(x.dtype)

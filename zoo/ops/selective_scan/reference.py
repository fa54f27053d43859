"""The selective scan by its definition: one token at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `selective_scan`, B and C [B,T,G,N]. Any dtype, differentiable any number of times."""
    inner = accumulation_dtype(x.dtype)
    batch, tokens, channels = x.shape
    u, step, rate = x.to(inner), dt.to(inner), A.to(inner)
    b, c = (part.to(inner).repeat_interleave(channels // part.shape[2], 2) for part in (B, C))
    if dt_bias is not None:
        step = step + dt_bias.to(inner)
    if dt_softplus:
        step = torch.logaddexp(step, torch.zeros_like(step))
    if cu_seqlens is None:
        runs = [(slice(None), slice(None), range(tokens))]
    else:
        ends = cu_seqlens.tolist()
        runs = [(slice(0, 1), slice(s, s + 1), range(a, z)) for s, (a, z) in enumerate(itertools.pairwise(ends))]
    outputs, finals = [], []
    for row, sequence, times in runs:
        if initial_state is not None:
            h = initial_state[sequence].to(inner)
        else:
            h = u.new_zeros(batch, channels, rate.shape[1])
        for t in times:
            step_t = step[row, t].unsqueeze(-1)
            h = (step_t * rate).exp() * h + step_t * u[row, t].unsqueeze(-1) * b[row, t]
            outputs.append((h * c[row, t]).sum(-1))
        finals.append(h)
    y = torch.stack(outputs, 1) if outputs else u
    if D is not None:
        y = y + D.to(inner) * u
    if z is not None:
        y = y * z.to(inner) * torch.sigmoid(z.to(inner))
    return y.to(x.dtype), torch.cat(finals)

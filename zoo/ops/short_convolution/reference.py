"""The definition of the short convolution, one sequence at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def short_convolution_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `short_convolution`, with silu for the activation."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        parts = [x[0, start:end] for start, end in itertools.pairwise(ends)]
    else:
        parts = list(x)
    outputs, states = [], []
    for s, tokens in enumerate(parts):
        before = None if initial_state is None else initial_state[s].to(x.dtype)
        y, state = _one_sequence(tokens.t(), weight, bias, silu, before)
        outputs.append(y.t())
        states.append(state)
    width = weight.shape[1]
    final = torch.stack(states) if states else x.new_zeros(0, x.shape[2], width - 1)
    if cu_seqlens is not None:
        return torch.cat(outputs)[None], final
    return (torch.stack(outputs) if outputs else torch.zeros_like(x)), final


def _one_sequence(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x [D,T], before [D,W-1] -> y [D,T], the last W-1 inputs [D,W-1]."""
    channels, tokens = x.shape
    width = weight.shape[1]
    acc = accumulation_dtype(x.dtype)
    if before is None:
        before = x.new_zeros(channels, width - 1)
    inputs = torch.cat([before, x], 1)  # [D, W-1+T]
    final = inputs[:, tokens:].clone()
    if tokens == 0:
        return x.clone(), final
    windows = inputs.to(acc).unfold(1, width, 1)  # [D, T, W]
    y = (windows * weight.to(acc)[:, None, :]).sum(2)
    if bias is not None:
        y = y + bias.to(acc)[:, None]
    if silu:
        y = y * torch.sigmoid(y)
    return y.to(x.dtype), final

"""The semiseparable scan by its definition: one token at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def semiseparable_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `semiseparable`. Any dtype, differentiable any number of times."""
    inner = accumulation_dtype(v.dtype)
    batch, tokens, heads, channels = v.shape
    per_group = heads // q.shape[2]
    q, k = (part.to(inner).repeat_interleave(per_group, 2) for part in (q, k))
    values = v.to(inner) if scale is None else v.to(inner) * scale.to(inner).unsqueeze(-1)
    decay = None if log_decay is None else log_decay.to(inner).exp()
    if cu_seqlens is None:
        runs = [(slice(None), slice(None), range(tokens))]
    else:
        ends = cu_seqlens.tolist()
        runs = [(slice(0, 1), slice(s, s + 1), range(a, b)) for s, (a, b) in enumerate(itertools.pairwise(ends))]
    outputs, finals = [], []
    for row, sequence, times in runs:
        if initial_state is not None:
            state = initial_state[sequence].to(inner)
        else:
            state = values.new_zeros(batch, heads, channels, q.shape[-1])
        for t in times:
            if decay is not None:
                state = state * decay[row, t, :, None, None]
            state = state + values[row, t].unsqueeze(-1) * k[row, t].unsqueeze(-2)
            outputs.append((state * q[row, t].unsqueeze(-2)).sum(-1))
        finals.append(state)
    y = torch.stack(outputs, 1) if outputs else values
    return y.to(v.dtype), torch.cat(finals)

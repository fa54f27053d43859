"""Linear attention by its definition: one token at a time, or one sum over all of them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.linear_attention.feature_map import FEATURE_MAPS


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    feature_map: str,
    causal: bool,
    normalize: bool,
    eps: float,
    scale: float,
    padding_mask: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `linear_attention`. Any dtype, differentiable any number of times."""
    inner = accumulation_dtype(v.dtype)
    heads = q.shape[2]
    phi_q, phi_k = (FEATURE_MAPS[feature_map](part.to(inner)) for part in (q, k))
    if padding_mask is not None:
        phi_k = phi_k * padding_mask[:, :, None, None]
    values = v.to(inner)
    if normalize:
        values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
    phi_k, values = (part.repeat_interleave(heads // part.shape[2], 2) for part in (phi_k, values))
    decay = None
    if log_decay is not None:
        decay = log_decay.to(inner).exp()
        decay = decay.unsqueeze(-1) if decay.dim() == 3 else decay  # [B,T,H,1] or [B,T,H,N]
    if cu_seqlens is None:
        runs = [(slice(None), slice(None), slice(None))]
    else:
        ends = cu_seqlens.tolist()
        runs = [(slice(0, 1), slice(s, s + 1), slice(a, b)) for s, (a, b) in enumerate(itertools.pairwise(ends))]
    outputs, finals = [], []
    for row, sequence, times in runs:
        queries, keys, written = phi_q[row, times], phi_k[row, times], values[row, times]
        if not causal:
            state = torch.einsum("bkhn,bkhp->bhnp", keys, written)
            outputs.append(torch.einsum("bthn,bhnp->bthp", queries, state))
            finals.append(state)
            continue
        if initial_state is not None:
            state = initial_state[sequence].to(inner)
        else:
            state = values.new_zeros(v.shape[0], heads, k.shape[-1], values.shape[-1])
        read = [written[:, :0]]
        for t in range(keys.shape[1]):
            if decay is not None:
                state = state * decay[row, times][:, t].unsqueeze(-1)
            state = state + keys[:, t].unsqueeze(-1) * written[:, t].unsqueeze(-2)
            read.append((queries[:, t].unsqueeze(-1) * state).sum(-2).unsqueeze(1))
        outputs.append(torch.cat(read, 1))
        finals.append(state)
    sums = torch.cat(outputs, 1) * scale
    y = sums[..., :-1] / (sums[..., -1:] + eps) if normalize else sums
    return y.to(v.dtype), torch.cat(finals)

"""The definition of the state space scan: one token after the other, one sequence at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def state_space_reference(
    x: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `state_space_scan`, without D; x and the state are in the accumulation dtype.

    The sums are in the wider dtype of x and A: a slow system in float64 is not one in float32.
    """
    inner = torch.promote_types(x.dtype, A.dtype)
    A, B, C, wide = (part.to(inner) for part in (A, B, C, x))
    rows = list(wide) if cu_seqlens is None else [wide[0, a:b] for a, b in itertools.pairwise(cu_seqlens.tolist())]
    outputs, states = [], []
    for s, row in enumerate(rows):
        state = wide.new_zeros(B.shape) if initial_state is None else initial_state[s].to(inner)  # [D,N]
        for token in row:
            state = (A @ state.unsqueeze(-1)).squeeze(-1) + B * token.unsqueeze(-1)
            outputs.append((C @ state.unsqueeze(-1)).squeeze(-1).t())
        states.append(state)
    sizes = (*x.shape[:2], C.shape[1], C.shape[0])
    y = torch.stack(outputs).reshape(sizes) if outputs else x.new_zeros(sizes)
    final = torch.stack(states) if states else x.new_zeros(0, *B.shape)
    return y.to(x.dtype), final.to(x.dtype)

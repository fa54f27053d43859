"""One token of causal FAVOR+ attention: what decoding calls."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.favor_attention.features import quotient


def one_token(log_q: Tensor, log_k: Tensor, values: Tensor, initial_state: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """log_q, log_k [B,1,H,M], values [B,1,H,P+1] (a 1 last), initial_state [B,H,M,P+2]; one dtype.

    Returns y [B,1,H,P] and the final state. Exponential features; a key that is masked out has logarithms of -inf.
    """
    before = initial_state[..., -1]
    top = torch.maximum(before, log_k[:, 0].detach())
    state = initial_state[..., :-1] * (before - top).exp().unsqueeze(-1)
    state = state + (log_k[:, 0] - top).exp().unsqueeze(-1) * values[:, 0].unsqueeze(-2)
    logits = log_q[:, 0] + top
    highest = logits.detach().amax(-1, keepdim=True)
    read = ((logits - highest).exp().unsqueeze(-2) @ state).squeeze(-2)
    y = quotient(read, highest, logits.shape[-1], eps)
    return y.unsqueeze(1), torch.cat([state, top.unsqueeze(-1)], -1)

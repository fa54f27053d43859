"""The mixing matrix of SSD in its factors: a mask of decays over a product of keys and queries."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.mixer import Factors


def ssd_factors(log_decay: Tensor, left: Tensor, right: Tensor, skip: Tensor) -> Factors:
    """Factors of M = L o (C (dt B)^T) + diag(D).

    log_decay: [B,T,H], <= 0. left: C [B,T,H,N]. right: dt B [B,T,H,N]. skip: D [H].
    """
    return Factors(
        mask=lambda which: decay_mask(log_decay[:, :, which]),
        left=left,
        right=right,
        skip=skip.expand(log_decay.shape),
    )


def decay_mask(log_decay: Tensor) -> Tensor:
    """L_ij = exp(sum_{j<r<=i} log_decay_r) for i >= j, else 0: the one-semiseparable mask [B,H,T,T].

    log_decay: [B,T,H]. Each sum adds its own terms; a difference of running sums would cancel digits.
    """
    tokens = log_decay.shape[1]
    lower = torch.ones(tokens, tokens, dtype=torch.bool, device=log_decay.device).tril()
    terms = log_decay.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, tokens)
    sums = terms.masked_fill(~lower.tril(-1), 0.0).cumsum(-2)
    return sums.masked_fill(~lower, -torch.inf).exp()


def initial_state_output(log_decay: Tensor, queries: Tensor, states: Tensor) -> Tensor:
    """What states [H,P,N] before the first token add to the output: exp(sum_{r<=t} log_decay_r) h C_t, [B,T,H,P].

    log_decay: [B,T,H]. queries: C [B,T,H,N].
    """
    return torch.einsum("bth,hpn,bthn->bthp", log_decay.cumsum(1).exp(), states, queries)

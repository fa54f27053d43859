"""The mixing matrix of FAVOR+ attention, written out: for looking at, and for tests of structure."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.favor_attention.features import half_square, log_features, projected, relu_features

ROWS = 16  # queries whose weights are formed together: [B,H,ROWS,T,M] is in memory


def mixing_matrix(
    q: Tensor,
    k: Tensor,
    projection: Tensor,
    *,
    features: str,
    causal: bool,
    eps: float,
    feature_eps: float,
    compat: str | None,
    key_eps: float = 0.0,
) -> Tensor:
    """Weights of every query over the keys, [B,H,T,T], in the accumulation dtype; exactly lower triangular if causal.

    q, k: [B,T,H,N]. feature_eps: a number, see `feature_epsilon`. key_eps: mass that every ReLU feature's normaliser
    starts with. Other arguments as in `favor_attention`.
    """
    if features == "relu" or compat == "jax":
        return _of_features(q, k, projection, features, causal, eps, feature_eps, key_eps)
    log_q, log_k = (log_features(part, projection, features).movedim(2, 1) for part in (q, k))  # [B,H,T,M]
    count, tokens = log_k.shape[-1], log_k.shape[-2]
    rows = []
    for start in range(0, tokens, ROWS):
        read = log_q[:, :, start : start + ROWS]
        logits = read.unsqueeze(-2) + log_k.unsqueeze(-3)  # [B,H,ROWS,T,M]
        if causal:
            time = torch.arange(tokens, device=q.device)
            later = time > time[start : start + ROWS].unsqueeze(-1)
            logits = logits.masked_fill(later.unsqueeze(-1), -torch.inf)
        highest = logits.detach().amax((-2, -1), keepdim=True)
        weights = (logits - highest).exp().sum(-1)
        total = weights.sum(-1, keepdim=True)
        if eps:
            total = total + eps * count * (-highest.squeeze(-1)).exp()
        rows.append(weights / total)
    return torch.cat(rows, -2)


def _of_features(
    q: Tensor,
    k: Tensor,
    projection: Tensor,
    features: str,
    causal: bool,
    eps: float,
    feature_eps: float,
    key_eps: float,
) -> Tensor:
    """The same from features as they are: ReLU, or exponential ones below their JAX maxima."""
    if features == "relu":
        phi_q, phi_k = relu_features(q, projection, feature_eps), relu_features(k, projection, feature_eps)
    else:
        dash_q, dash_k = projected(q, projection, features), projected(k, projection, features)
        eps *= dash_q.shape[-1]
        phi_q = (dash_q - half_square(q) - dash_q.detach().amax(-1, keepdim=True)).exp() + feature_eps
        phi_k = (dash_k - half_square(k) - dash_k.detach().amax((1, 3), keepdim=True)).exp() + feature_eps
    weights = torch.einsum("bthm,bshm->bhts", phi_q, phi_k)
    weights = weights.tril() if causal else weights
    total = weights.sum(-1, keepdim=True) + eps + key_eps * phi_q.sum(-1).movedim(2, 1).unsqueeze(-1)
    return weights / torch.where(total > 0, total, 1.0)

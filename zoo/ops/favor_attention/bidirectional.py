"""FAVOR+ attention without order: every query reads one sum over all keys of its sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.favor_attention.features import empty_maximum, half_square, projected, quotient
from zoo.ops.linear_attention.bidirectional import sum_over_all


def attend_exponentials(
    log_q: Tensor, log_k: Tensor, values: Tensor, cu_seqlens: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """log_q [B,T,H,M], log_k [B,K,H,M], values [B,K,H,P+1] (a 1 last), one dtype; K = T if packed; K >= 1.

    Keys that are masked out have logarithms of -inf. Returns y [B,T,H,P] and the sums [S,H,M,P+2].
    """
    top, by_key = highest_key(log_k.detach(), cu_seqlens)
    by_query = top.unsqueeze(1) if cu_seqlens is None else by_key
    logits = log_q + by_query
    highest = logits.detach().amax(-1, keepdim=True)
    sums, total = sum_over_all((logits - highest).exp(), (log_k - by_key).exp(), values, cu_seqlens)
    y = quotient(sums, highest, log_q.shape[-1], eps)
    return y, torch.cat([total, top.unsqueeze(-1)], -1)


def attend_like_jax(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    projection: Tensor,
    features: str,
    eps: float,
    feature_eps: float,
    padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`attend_exponentials` with the stabiliser of the JAX code: features are M^-1/2 (exp(.) + feature_eps), where the
    largest <w, x'> (of a query's own features; of all features of all keys) is subtracted in the exponent.

    q [B,T,H,N], k [B,K,H,N], values [B,K,H,P+1] in the accumulation dtype. The maxima are constants to autograd.
    """
    dash_q, dash_k = projected(q, projection, features), projected(k, projection, features)
    phi_q = (dash_q - half_square(q) - dash_q.detach().amax(-1, keepdim=True)).exp() + feature_eps
    seen = dash_k.detach()
    if padding_mask is not None:
        seen = seen.masked_fill(~padding_mask[:, :, None, None], -torch.inf)
    top, by_key = highest_key(seen.amax(-1, keepdim=True), cu_seqlens)
    phi_k = (dash_k - half_square(k) - by_key).exp() + feature_eps
    if padding_mask is not None:
        phi_k = phi_k.masked_fill(~padding_mask[:, :, None, None], 0.0)
    sums, total = sum_over_all(phi_q, phi_k, values, cu_seqlens)
    count = phi_q.shape[-1]
    return quotient(sums, 0.0, count, eps), torch.cat([total, top.unsqueeze(-2).expand(-1, -1, count, -1)], -1)


def highest_key(log_k: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Maximum over the keys [B,K,H,M] of each sequence, [S,H,M], and the same for every key, [B,1 or K,H,M]."""
    least = empty_maximum(log_k.dtype)
    if cu_seqlens is None:
        top = log_k.amax(1).clamp(min=least)
        return top, top.unsqueeze(1)
    bounds = cu_seqlens.long()
    time = torch.arange(log_k.shape[1], device=log_k.device)
    owner = torch.searchsorted(bounds, time, right=True) - 1
    empty = log_k.new_full((bounds.numel() - 1, *log_k.shape[2:]), least)
    top = empty.scatter_reduce(0, owner[:, None, None].expand_as(log_k[0]), log_k[0], "amax")
    return top, top.index_select(0, owner).unsqueeze(0)

"""FAVOR+ attention in plain PyTorch: features in memory, then matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.favor_attention.bidirectional import attend_exponentials, attend_like_jax
from zoo.ops.favor_attention.features import empty_maximum, log_features, quotient, relu_features
from zoo.ops.favor_attention.recurrence import one_token
from zoo.ops.favor_attention.running_maximum import empty_state, scan_exponentials
from zoo.ops.linear_attention.bidirectional import sum_over_all
from zoo.ops.linear_attention.feature_map import for_every_head
from zoo.ops.semiseparable.chunked import scan


def favor_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    features: str,
    causal: bool,
    eps: float,
    feature_eps: float,
    compat: str | None,
    padding_mask: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `favor_attention`. Everything is computed in the accumulation dtype; y is rounded once."""
    inner, heads = accumulation_dtype(v.dtype), q.shape[2]
    values = F.pad(for_every_head(v.to(inner), heads), (0, 1), value=1.0)
    if features == "relu":
        y, final = _relu(
            q, k, values, projection, causal, eps, feature_eps, padding_mask, initial_state, cu_seqlens
        )  # fmt: skip
        return y.to(v.dtype), final
    if compat == "jax":
        keys = for_every_head(k.to(inner), heads)
        y, final = attend_like_jax(
            q.to(inner), keys, values, projection, features, eps, feature_eps, padding_mask, cu_seqlens
        )  # fmt: skip
        return y.to(v.dtype), final
    if causal and (v.shape[1] > 1 or cu_seqlens is not None):
        y, final = scan_exponentials(
            q, k, values, projection, features, padding_mask, initial_state, cu_seqlens, eps
        )  # fmt: skip
        return y.to(v.dtype), final
    log_q = log_features(q, projection, features)
    log_k = log_features(k, projection, features)
    if padding_mask is not None:
        log_k = log_k.masked_fill(~padding_mask[:, :, None, None], -torch.inf)
    log_k = for_every_head(log_k, heads)
    if causal:
        if initial_state is None:
            initial_state = empty_state(v, heads, log_q.shape[-1], cu_seqlens)
        y, final = one_token(log_q, log_k, values, initial_state, eps)
    else:
        y, final = attend_exponentials(log_q, log_k, values, cu_seqlens, eps)
    return y.to(v.dtype), final


def _relu(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    projection: Tensor,
    causal: bool,
    eps: float,
    feature_eps: float,
    padding_mask: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """ReLU features need no maximum: linear attention over them."""
    heads = q.shape[2]
    phi_q, phi_k = relu_features(q, projection, feature_eps), relu_features(k, projection, feature_eps)
    if padding_mask is not None:
        phi_k = phi_k.masked_fill(~padding_mask[:, :, None, None], 0.0)
    phi_k = for_every_head(phi_k, heads)
    if causal:
        before = None if initial_state is None else initial_state[..., :-1].mT
        sums, final = scan(phi_q, phi_k, values, None, None, before, cu_seqlens)
        final = final.mT
    else:
        sums, final = sum_over_all(phi_q, phi_k, values, cu_seqlens)
    top = log_scale_after(final, padding_mask, initial_state, cu_seqlens)
    return quotient(sums, 0.0, 1, eps), torch.cat([final, top], -1)


def log_scale_after(
    final: Tensor, padding_mask: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Last column [S,H,M,1] of a state of ReLU features: 0 as soon as there was a key, until then what it was."""
    top = torch.zeros_like(final[..., :1])
    if padding_mask is None and cu_seqlens is None:
        return top
    keys = cu_seqlens.diff() if cu_seqlens is not None else padding_mask.sum(1)  # type: ignore[union-attr]
    if initial_state is None:
        before = torch.full_like(top, empty_maximum(top.dtype))
    else:
        before = initial_state[..., -1:]
    return torch.where((keys > 0)[:, None, None, None], top, before)

"""Causal linear attention by Triton kernels: the walk in half precision without decay, else the semiseparable scan."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.linear_attention.feature_map import features, for_every_head, key_features
from zoo.ops.linear_attention.mapped import mapped
from zoo.ops.linear_attention.normaliser import finish
from zoo.ops.linear_attention.walk_path import walk, walks
from zoo.ops.semiseparable.triton_path import refuses as scan_refuses
from zoo.ops.semiseparable.triton_path import semiseparable_triton


def refuses(*, causal: bool, channel_decay: bool, **sizes: int) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    if not causal:
        return "has no kernel for causal=False, which is two matrix products that PyTorch does as fast"
    if channel_decay:
        return "takes one log decay per head, [B,T,H]; one per channel, [B,T,H,N], is served by 'chunked'"
    return scan_refuses(**sizes)


def linear_attention_triton(
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
    """Shapes as in `linear_attention`. Features are rounded to the dtype of v once."""
    if not walks(v, log_decay, normalize):
        return _by_scans(
            q, k, v, log_decay, feature_map, normalize, eps, scale, padding_mask, initial_state, cu_seqlens
        )
    if feature_map == "identity":  # padded slots hold 0 already
        return walk(q, k, v, initial_state, cu_seqlens, normalize, eps, scale)
    phi_q, phi_k = mapped(q, feature_map), mapped(k, feature_map)
    if padding_mask is not None:  # phi(0) need not be 0
        phi_k = phi_k.masked_fill(~padding_mask[:, :, None, None], 0.0)
    return walk(phi_q, phi_k, v, initial_state, cu_seqlens, normalize, eps, scale)


def _by_scans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    feature_map: str,
    normalize: bool,
    eps: float,
    scale: float,
    padding_mask: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Feature map and division in PyTorch around the semiseparable scan, which serves every dtype and decays.

    Features are rounded to the dtype of v once, so that numerator and denominator weigh by the same numbers. The
    denominator is a scan of its own in float32. Numerators, which grow with T, are float32 for float16 inputs: their
    quotient has the size of v, they themselves may pass 65504. In bfloat16 the gradients of q and k lose digits under
    `normalize` where values lie far from 0 compared with their spread, as they do in tiled softmax attention.
    """
    heads = q.shape[2]
    phi_q = features(q, feature_map).to(v.dtype)
    phi_k = key_features(k, feature_map, heads, padding_mask).to(v.dtype)
    values = for_every_head(v, heads)
    initial = None if initial_state is None else initial_state.mT  # [S,H,P(+1),N]
    if not normalize:
        sums, final = semiseparable_triton(phi_q, phi_k, values, log_decay, None, initial, cu_seqlens)
        return finish(sums, False, eps, scale).to(v.dtype), final.mT
    wide_q, wide_k = phi_q.float(), phi_k.float()
    ones = torch.ones_like(values[..., :1], dtype=torch.float32)
    first, first_ones = (None, None) if initial is None else (initial[:, :, :-1], initial[:, :, -1:])
    if v.dtype == torch.float16:
        phi_q, phi_k, values = wide_q, wide_k, values.float()
    sums, final = semiseparable_triton(phi_q, phi_k, values, log_decay, None, first, cu_seqlens)
    counts, final_ones = semiseparable_triton(wide_q, wide_k, ones, log_decay, None, first_ones, cu_seqlens)
    y = finish(torch.cat([sums.float(), counts], -1), True, eps, scale)
    return y.to(v.dtype), torch.cat([final, final_ones], 2).mT

"""The definition of softmax attention: the whole matrix, one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def softmax_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    bias: Tensor | None,
    padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """Arguments and result of `softmax_attention`; any dtype, differentiable any number of times."""
    if cu_seqlens is not None and cu_seqlens_k is not None:
        q_ends, k_ends = cu_seqlens.tolist(), cu_seqlens_k.tolist()
        pieces = []
        for s in range(len(q_ends) - 1):
            rows, cols = slice(q_ends[s], q_ends[s + 1]), slice(k_ends[s], k_ends[s + 1])
            piece = None if bias is None else _crop(bias, rows, cols)
            pieces.append(_attend(q[:, rows], k[:, cols], v[:, cols], causal, scale, piece))
        return torch.cat(pieces, 1)
    if padding_mask is None:
        return _attend(q, k, v, causal, scale, bias)
    key_real = padding_mask[:, :, None, None]
    k, v = torch.where(key_real, k, 0), torch.where(key_real, v, 0)
    visible = padding_mask[:, None, None, :]
    if q.shape[1] == k.shape[1]:
        q = torch.where(key_real, q, 0)
        visible = visible & padding_mask[:, None, :, None]
    return _attend(q, k, v, causal, scale, bias, visible)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, bias: Tensor | None, visible: Tensor | None = None
) -> Tensor:
    """visible: bool, broadcastable to [B,H,Tq,Tk], or None for all."""
    queries, keys, each = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    wide = accumulation_dtype(q.dtype)
    k, v = k.repeat_interleave(each, 2), v.repeat_interleave(each, 2)
    logits = torch.einsum("bihp,bjhp->bhij", q.to(wide), k.to(wide)) * scale
    sees = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        sees = sees.tril(keys - queries)
    if visible is not None:
        sees = sees & visible
    if bias is not None and bias.dtype == torch.bool:
        sees = sees & bias
    elif bias is not None:
        sees = sees & (bias != -torch.inf)
        logits = logits + bias.to(wide)
    lowest = torch.finfo(wide).min
    weights = torch.where(sees, torch.where(sees, logits, lowest).softmax(-1), 0)
    return torch.einsum("bhij,bjhp->bihp", weights, v.to(wide)).to(q.dtype)


def _crop(bias: Tensor, rows: slice, cols: slice) -> Tensor:
    """The part of a bias that belongs to some queries and keys; axes of size 1 stay."""
    bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    if bias.shape[2] != 1:
        bias = bias[:, :, rows]
    return bias if bias.shape[3] == 1 else bias[..., cols]

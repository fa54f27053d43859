"""Softmax attention in plain PyTorch, one block of queries at a time: memory grows with Tk, not with Tq Tk."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.softmax_attention.visibility import clear_padding, visible_keys

BLOCK = 128


def softmax_attention_chunked(
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
    block: int = BLOCK,
) -> Tensor:
    """Arguments and result of `softmax_attention`. block: queries per step, > 0.

    Dot operands have the dtype of q, logits and statistics the accumulation dtype. In eager training each block is
    computed again in the backward, so that its weights are not kept.
    """
    queries, keys = q.shape[1], k.shape[1]
    real = padding_mask if padding_mask is not None and queries == keys else None
    if padding_mask is not None:
        k, v = clear_padding(k, padding_mask), clear_padding(v, padding_mask)
        q = q if real is None else clear_padding(q, real)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    again = torch.is_grad_enabled() and queries > block and not torch.compiler.is_compiling()
    pieces = []
    for start in range(0, max(queries, 1), block):
        stop = min(start + block, queries)
        seen = min(keys, max(0, stop + keys - queries)) if causal and cu_seqlens is None else keys
        sees = visible_keys(
            torch.arange(start, stop, device=q.device),
            torch.arange(seen, device=q.device),
            offset=keys - queries,
            causal=causal,
            padding_mask=padding_mask,
            cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
        )
        part = None
        if bias is not None:
            part = bias if bias.shape[2] == 1 else bias[:, :, start:stop]
            part = part if part.shape[3] == 1 else part[..., :seen]
        operands = (q[:, start:stop], k[:, :seen], v[:, :seen], sees, part, scale)
        if again:
            pieces.append(checkpoint(_attend, *operands, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(_attend(*operands))
    y = torch.cat(pieces, 1)
    return y if real is None else clear_padding(y, real)


def _attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """Full rows of a few queries. q [B,t,H,P], k [B,K,G,P], v [B,K,G,Pv], sees and bias like [B,H,t,K]."""
    groups = k.shape[2]
    wide = accumulation_dtype(q.dtype)
    q = q.reshape(*q.shape[:2], groups, q.shape[2] // groups, q.shape[3])
    logits = torch.einsum("btgrp,bkgp->bgrtk", q.to(wide), k.to(wide)) * scale
    if sees is not None:
        sees = sees.unsqueeze(-4) if sees.dim() == 4 else sees
    if bias is not None:
        bias = bias.unsqueeze(1) if bias.shape[1] == 1 else bias.reshape(bias.shape[0], groups, -1, *bias.shape[2:])
        shown = bias if bias.dtype == torch.bool else bias != -torch.inf
        sees = shown if sees is None else sees & shown
        logits = logits if bias.dtype == torch.bool else logits + bias.to(wide)
    if sees is not None:
        logits = torch.where(sees, logits, torch.finfo(wide).min)
    weights = logits.softmax(-1)
    if sees is not None:
        weights = torch.where(sees, weights, 0)
    y = torch.einsum("bgrtk,bkgp->btgrp", weights.to(v.dtype).to(wide), v.to(wide))
    return y.flatten(2, 3).to(q.dtype)

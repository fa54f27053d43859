"""Softmax attention through torch's scaled_dot_product_attention, which chooses among its own kernels.

Its `is_causal` is aligned at the start, so it is used only where start and end are the same; every other pattern
becomes a mask. Rows that see no key are given all of them and zeroed afterwards, since kernels differ there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from zoo.ops.softmax_attention import cpu_flops as cpu_flops  # registers them
from zoo.ops.softmax_attention.visibility import clear_padding, visible_keys


def softmax_attention_sdpa(
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
    """Arguments and result of `softmax_attention`, without empty inputs; a floating bias has the dtype of q."""
    queries, keys = q.shape[1], k.shape[1]
    if cu_seqlens is not None and cu_seqlens_k is not None:
        if bias is None and q.device.type == "cpu" and not torch.compiler.is_compiling():
            return _each_sequence(q, k, v, causal, scale, cu_seqlens.tolist(), cu_seqlens_k.tolist())
    elif padding_mask is None and bias is None and (not causal or queries in (1, keys)):
        return _unmasked(q, k, v, causal and queries > 1, scale)
    real = padding_mask if padding_mask is not None and queries == keys else None
    if padding_mask is not None:
        k, v = clear_padding(k, padding_mask), clear_padding(v, padding_mask)
        q = q if real is None else clear_padding(q, real)
    sees = visible_keys(
        torch.arange(queries, device=q.device),
        torch.arange(keys, device=q.device),
        offset=keys - queries,
        causal=causal,
        padding_mask=padding_mask,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
    )
    y = _masked(q, k, v, scale, sees, bias)
    return y if real is None else clear_padding(y, real)


def _unmasked(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    y = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


def _masked(q: Tensor, k: Tensor, v: Tensor, scale: float, sees: Tensor | None, bias: Tensor | None) -> Tensor:
    """sees: bool, broadcastable to [B,H,Tq,Tk], or None. bias: bool, or the dtype of q, or None."""
    each = q.shape[2] // k.shape[2]
    if each > 1:  # the kernels that take a mask do not take grouped heads
        k, v = k.repeat_interleave(each, 2), v.repeat_interleave(each, 2)
    if bias is not None:
        shown = bias if bias.dtype == torch.bool else bias != -torch.inf
        sees = shown if sees is None else sees & shown
    assert sees is not None
    alive = sees.any(-1, keepdim=True)
    sees = sees | ~alive
    if bias is None or bias.dtype == torch.bool:
        mask = sees
    else:
        mask = torch.where(sees, torch.where(bias == -torch.inf, 0, bias), -torch.inf)
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    y = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask.expand(full), scale=scale
    )
    return torch.where(alive, y, 0).transpose(1, 2)


def _each_sequence(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, q_ends: list[int], k_ends: list[int]
) -> Tensor:
    """Packed sequences one after the other: less work than a mask over all of them."""
    pieces = []
    for s in range(len(q_ends) - 1):
        rows, cols = slice(q_ends[s], q_ends[s + 1]), slice(k_ends[s], k_ends[s + 1])
        if rows.stop == rows.start:
            continue
        if cols.stop == cols.start:
            pieces.append(torch.zeros_like(q[:, rows, :, :1]).expand(-1, -1, -1, v.shape[3]))
            continue
        piece = softmax_attention_sdpa(
            q[:, rows],
            k[:, cols],
            v[:, cols],
            causal=causal,
            scale=scale,
            bias=None,
            padding_mask=None,
            cu_seqlens=None,
            cu_seqlens_k=None,
        )
        pieces.append(piece)
    return torch.cat(pieces, 1)

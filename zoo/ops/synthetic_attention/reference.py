"""The definition of synthetic attention: the whole matrix, one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.synthetic_attention.parts import Parts


def synthetic_attention_reference(
    parts: Parts,
    v: Tensor,
    *,
    queries: int,
    past: Tensor | None,
    causal: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """Arguments and result of `synthetic_attention`; any dtype, differentiable any number of times."""
    with torch.autocast(v.device.type, enabled=False):
        if cu_seqlens is not None and cu_seqlens_k is not None:
            q_ends, k_ends = cu_seqlens.tolist(), cu_seqlens_k.tolist()
            pieces = []
            for s in range(len(q_ends) - 1):
                rows, cols = slice(q_ends[s], q_ends[s + 1]), slice(k_ends[s], k_ends[s + 1])
                count, keys = rows.stop - rows.start, cols.stop - cols.start
                pieces.append(_attend(parts.of_queries(rows).of_keys(cols), v[:, cols], count, keys - count, causal))
            return torch.cat(pieces, 1)
        if past is None:
            return _attend(parts, v, queries, v.shape[1] - queries, causal)
        each = []
        for b, before in enumerate(past.tolist()):
            own = Parts(*(tensor if name == "table" or tensor is None else tensor[b : b + 1]
                          for name, tensor in parts._asdict().items()))  # fmt: skip
            each.append(_attend(own, v[b : b + 1], queries, before, causal))
        return torch.cat(each)


def _attend(parts: Parts, v: Tensor, queries: int, before: int, causal: bool) -> Tensor:
    """before: position of the first query; may be below 0, for queries that stand before every key."""
    keys, wide = v.shape[1], accumulation_dtype(v.dtype)
    logits = v.new_zeros(v.shape[0], v.shape[2], queries, keys, dtype=wide)
    if parts.q is not None and parts.k is not None:
        logits = logits + torch.einsum("bihn,bjhn->bhij", parts.q.to(wide), parts.k.to(wide))
    position = torch.arange(before, before + queries, device=v.device)
    if parts.table is not None:
        logits = logits + parts.table.to(wide)[:, position.clamp(0, parts.table.shape[1] - 1), :keys]
    if parts.left is not None and parts.right is not None:
        key, width = torch.arange(keys, device=v.device), parts.right.shape[-1]
        product = parts.left.to(wide)[..., key // width] * parts.right.to(wide)[..., key % width]
        logits = logits + product.transpose(1, 2)
    sees = torch.ones(queries, keys, dtype=torch.bool, device=v.device)
    if causal:
        sees = torch.arange(keys, device=v.device) <= position[:, None]
    weights = torch.where(sees, torch.where(sees, logits, torch.finfo(wide).min).softmax(-1), 0)
    return torch.einsum("bhij,bjhp->bihp", weights, v.to(wide)).to(v.dtype)

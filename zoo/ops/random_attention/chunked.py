"""Random attention in plain PyTorch: weights once, then one product per block of rows, without keys they never see."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.random_attention.cost import row_blocks


def random_attention_chunked(table: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Arguments and result of `random_attention`; dot operands have the dtype of v, sums the accumulation dtype."""
    wide = accumulation_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        weights = row_weights(table.to(wide), causal).to(v.dtype).to(wide)  # [H,Tq,Tk]
        values = v.to(wide)
        blocks = list(row_blocks(weights.shape[1], weights.shape[2], causal))
        rows = weights.split([end - first for first, end, _ in blocks], 1)
        pieces = [
            torch.einsum("hij,bjhp->bihp", part[:, :, :seen], values[:, :seen])
            for part, (_, _, seen) in zip(rows, blocks, strict=True)
        ]
        return (torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]).to(v.dtype)


def row_weights(logits: Tensor, causal: bool) -> Tensor:
    """Softmax of logits [H,Tq,Tk] over the keys that each query sees; rows that see none are 0."""
    if not causal or logits.shape[1] == 1:
        return logits.softmax(-1)
    queries, keys = logits.shape[1:]
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=logits.device).triu(keys - queries + 1)
    weights = logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(-1)
    return weights if queries <= keys else weights.masked_fill(hidden, 0)

"""The definition of random attention: the whole matrix of weights, one product."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def random_attention_reference(table: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Arguments and result of `random_attention`; any dtype, differentiable any number of times."""
    queries, keys = table.shape[1:]
    wide = accumulation_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        sees = torch.ones(queries, keys, dtype=torch.bool, device=v.device)
        if causal:
            sees = sees.tril(keys - queries)
        logits = torch.where(sees, table.to(wide), torch.finfo(wide).min)
        weights = torch.where(sees, logits.softmax(-1), 0)
        return torch.einsum("hij,bjhp->bihp", weights, v.to(wide)).to(v.dtype)

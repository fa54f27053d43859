"""The definition of Linformer attention: rows with padding run one by one, without it."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def linformer_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor, *, padding_mask: Tensor | None
) -> Tensor:
    """Arguments and result of `linformer_attention`; any dtype, differentiable any number of times."""
    if padding_mask is None:
        return _attend(q, k, v, E, F)
    rows = []
    for b, real in enumerate(padding_mask):
        places = real.nonzero().squeeze(1)
        qb, kb, vb = (tensor[b : b + 1].index_select(1, places) for tensor in (q, k, v))
        y = _attend(qb, kb, vb, E[..., : len(places)], F[..., : len(places)])
        rows.append(torch.zeros_like(q[b]).index_copy(0, places, y[0]))
    return torch.stack(rows) if rows else torch.zeros_like(q)


def _attend(q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor) -> Tensor:
    """E and F are exactly as long as k and v."""
    groups, each = k.shape[2], q.shape[2] // k.shape[2]
    wide = accumulation_dtype(q.dtype)
    E, F = (matrix.to(wide).expand(groups, *matrix.shape[-2:]) for matrix in (E, F))
    keys = torch.einsum("grt,btgp->bgrp", E, k.to(wide)).repeat_interleave(each, 1)  # [B,H,R,P]
    values = torch.einsum("grt,btgp->bgrp", F, v.to(wide)).repeat_interleave(each, 1)
    logits = torch.einsum("bthp,bhrp->bhtr", q.to(wide), keys) * q.shape[3] ** -0.5
    return torch.einsum("bhtr,bhrp->bthp", logits.softmax(-1), values).to(q.dtype)

"""Linformer attention in plain PyTorch: one product per projection, then torch's own attention kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.alignment import RealFirst
from zoo.ops.softmax_attention.sdpa import softmax_attention_sdpa


def linformer_attention_chunked(
    q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor, *, padding_mask: Tensor | None
) -> Tensor:
    """Arguments and result of `linformer_attention`, without empty inputs; E and F are [...,R,T] in the dtype of q."""
    real = None
    if padding_mask is not None:
        real = padding_mask[:, :, None, None]
        aligned = RealFirst(padding_mask)
        q, k, v = torch.where(real, q, 0), aligned.turn(k), aligned.turn(v)
    y = softmax_attention_sdpa(
        q,
        project(E, k),
        project(F, v),
        causal=False,
        scale=q.shape[3] ** -0.5,
        bias=None,
        padding_mask=None,
        cu_seqlens=None,
        cu_seqlens_k=None,
    )
    return y if real is None else torch.where(real, y, 0)


def project(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix [R,T] or [G,R,T], x [B,T,G,P] -> [B,R,G,P]; nothing is transposed or copied if all heads share one."""
    if matrix.dim() == 3:
        return torch.einsum("grt,btgp->brgp", matrix, x)
    every = matrix.expand(x.shape[0], -1, -1)
    projected: Tensor = torch.bmm(every, x.flatten(2)).unflatten(2, x.shape[2:])
    return projected

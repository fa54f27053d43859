"""The token MLP in plain PyTorch: two batched products with the weights on the left, so that x stays as it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_mlp_chunked(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, tanh: bool) -> Tensor:
    """x [B,T,D], w1 [E,T], w2 [T,E], all in one dtype -> y [B,T,D]."""
    hidden = F.gelu(affine(w1, b1, x), approximate="tanh" if tanh else "none")
    return affine(w2, b2, hidden)


def affine(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """weight [M,N] times every x [B,N,D], plus bias [M] on its rows: [B,M,D]."""
    every = weight.expand(x.shape[0], -1, -1)  # matmul would fold the batch into rows, and copy x for it
    return torch.bmm(every, x) if bias is None else torch.baddbmm(bias[:, None], every, x)

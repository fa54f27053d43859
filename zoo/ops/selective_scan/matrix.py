"""The selective scan as a matrix for each channel, written out. Quadratic in T; for study and tests."""

from __future__ import annotations

import torch
from torch import Tensor


def mixing_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """M [B,E,T,T] with y = M x in every channel: M_ij = sum_n C_in exp(sum_{j<r<=i} dt_r A_n) B_jn dt_j for i >= j.

    dt: [B,T,E], after bias and softplus. A: [E,N]. B, C: [B,T,E,N], those that each channel reads. The skip D and the
    gate are not part of it. The state is summed one channel of it at a time, so memory is that of a few matrices.
    """
    sums = dt.cumsum(1).transpose(1, 2)  # [B,E,T]
    elapsed = sums.unsqueeze(-1) - sums.unsqueeze(-2)
    later = torch.ones(dt.shape[1], dt.shape[1], dtype=torch.bool, device=dt.device).triu(1)
    matrix = torch.zeros_like(elapsed)
    for n in range(A.shape[1]):
        decay = (elapsed * A[:, n, None, None]).masked_fill(later, -torch.inf).exp()
        queries, keys = C[..., n].transpose(1, 2), B[..., n].transpose(1, 2)
        matrix = matrix + decay * queries.unsqueeze(-1) * keys.unsqueeze(-2)
    return matrix * dt.transpose(1, 2).unsqueeze(-2)

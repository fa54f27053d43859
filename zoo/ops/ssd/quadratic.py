"""SSD as attention: the matrix that the recurrence multiplies by, written out. Quadratic in T; for study and tests."""

from __future__ import annotations

import torch
from torch import Tensor


def mixing_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """M [B,H,T,T] with y = M x: M_ij = exp(sum_{j<r<=i} dt_r A) <C_i, B_j> dt_j for i >= j, else 0.

    dt: [B,T,H], after bias, softplus and clamp. A: [H]. B, C: [B,T,G,N]. The skip D is not part of it.
    """
    per_group = dt.shape[2] // B.shape[2]
    scores = torch.einsum("bign,bjgn->bgij", C, B).repeat_interleave(per_group, 1)
    sums = (dt * A).cumsum(1).transpose(1, 2)  # [B,H,T]
    later = torch.ones(dt.shape[1], dt.shape[1], dtype=torch.bool, device=dt.device).tril()
    decay = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(~later, -torch.inf).exp()
    return scores * decay * dt.transpose(1, 2).unsqueeze(-2)


def ssd_quadratic(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and final state of `ssd` through `mixing_matrix`; dt is final (no bias, softplus, clamp), all of one dtype.

    Source: Dao & Gu 2024, arXiv 2405.21060, section 3.2 (the dual form).
    """
    per_group = x.shape[2] // B.shape[2]
    y = torch.einsum("bhij,bjhp->bihp", mixing_matrix(dt, A, B, C), x)
    sums = (dt * A).cumsum(1)
    to_end = (sums[:, -1:] - sums).exp() * dt
    keys, queries = B.repeat_interleave(per_group, 2), C.repeat_interleave(per_group, 2)
    final_state = torch.einsum("bth,bthp,bthn->bhpn", to_end, x, keys)
    if initial_state is not None:
        y = y + torch.einsum("bth,bhpn,bthn->bthp", sums.exp(), initial_state, queries)
        final_state = final_state + sums[:, -1].exp()[..., None, None] * initial_state
    if D is not None:
        y = y + (D.unsqueeze(-1) if D.dim() == 1 else D) * x
    return y, final_state

"""The definition of the Cauchy sums, pole by pole in complex numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def cauchy_reference(v: Tensor, w: Tensor, z: Tensor, q: Tensor | None) -> Tensor:
    """Arguments and result of `cauchy_kernel`."""
    acc = accumulation_dtype(v.dtype)
    weights, poles = (torch.view_as_complex(part.to(acc).contiguous()).unsqueeze(-1) for part in (v, w.unsqueeze(1)))
    nodes = torch.view_as_complex(z.to(acc).contiguous())
    factors = torch.ones_like(nodes) if q is None else torch.view_as_complex(q.to(acc).contiguous())
    terms = weights / (nodes - factors * poles) + weights.conj() / (nodes - factors * poles.conj())  # [D,R,N,K]
    return torch.view_as_real(terms.sum(2)).to(v.dtype)

"""One token of LTI attention: what decoding calls."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.lti_attention.factors import power_of, times


def one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    c: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`lti_attention` for T = 1: S = e^{log_a} S + k v^T, y = q^T (2 Re sum_n c_n S_n) + D <q, k> v.

    Returns y [B,1,H,P] and the state [B,H,M,2,P,P] in the accumulation dtype.
    """
    inner = accumulation_dtype(v.dtype)
    wide_q, wide_k, wide_v = (part[:, 0].to(inner) for part in (q, k, v))  # [B,H,P]
    pair = wide_k.unsqueeze(-1) * wide_v.unsqueeze(-2)  # [B,H,P,P]
    weight = (2.0 * c.double()).to(inner)  # [H,M,2]
    re = pair.unsqueeze(2).expand(*pair.shape[:2], log_a.shape[1], *pair.shape[2:])  # [B,H,M,P,P]
    im = torch.zeros_like(re)
    if initial_state is not None:
        factor = power_of(log_a, 1).to(inner)[..., None, None, :]
        kept = times(initial_state.to(inner).movedim(3, -1), factor)
        re, im = re + kept[..., 0], kept[..., 1]
    seen = (weight[..., 0, None, None] * re - weight[..., 1, None, None] * im).sum(2)
    if D is not None:
        seen = seen + D.to(inner)[:, None, None] * pair
    y = (wide_q.unsqueeze(-2) @ seen).transpose(1, 2)
    return y, torch.stack([re, im], 3)

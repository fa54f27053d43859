"""One token of LTI attention: what decoding calls."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.lti_attention.factors import power_of


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
        a_re, a_im = power_of(log_a, 1)[..., None, None, :].unbind(-1)  # [H,M,1,1]
        less, a_im = (a_re - 1.0).to(inner), a_im.to(inner)  # a factor near 1 would round the rate of a slow mode away
        s_re, s_im = initial_state.to(inner).unbind(3)
        re = re + (s_re + (less * s_re - a_im * s_im))
        im = s_im + (less * s_im + a_im * s_re)
    seen = (weight[..., 0, None, None] * re - weight[..., 1, None, None] * im).sum(2)
    if D is not None:
        seen = seen + D.to(inner)[:, None, None] * pair
    y = (wide_q.unsqueeze(-2) @ seen).transpose(1, 2)
    return y, torch.stack([re, im], 3)

"""One token of the diagonal scan: what decoding calls."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.lti.call import Scan
from zoo.ops.lti.modes import power


def scan_one_token(x: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
    """`lti_scan` for T = 1 without packing: S = e^{log_a} S + x, y = 2 Re sum_n c_n S_n + D x; a token looks ahead to
    nothing but, with reverse_lag 0, itself. Returns y [B,1,D] and the state [B,D,M,2]."""
    inner = accumulation_dtype(x.dtype)
    token = x[:, 0].to(inner).unsqueeze(-1)  # [B,D,1]
    re = token.expand(-1, -1, scan.log_a.shape[1])
    im = torch.zeros_like(re)
    if scan.initial_state is not None:
        a_re, a_im = power(scan.log_a, 1)
        less, a_im = (a_re - 1.0).to(inner), a_im.to(inner)  # a factor near 1 would round the rate of a slow mode away
        s_re, s_im = scan.initial_state.to(inner).unbind(-1)
        re = token + (s_re + (less * s_re - a_im * s_im))
        im = s_im + (less * s_im + a_im * s_re)
    c_re, c_im = (2.0 * scan.c.double()).to(inner).unbind(-1)
    y = (c_re * re - c_im * im).sum(-1)
    skip = None if scan.D is None else scan.D.to(inner)
    if scan.c_reverse is not None and scan.reverse_lag == 0:
        self_weight = (2.0 * scan.c_reverse[..., 0].double()).sum(-1).to(inner)
        skip = self_weight if skip is None else skip + self_weight
    if skip is not None:
        y = y + skip * token.squeeze(-1)
    return y.unsqueeze(1).to(x.dtype), torch.stack([re, im], -1)

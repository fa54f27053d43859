"""The diagonal scan as a long convolution: the kernel is generated, its spectrum multiplied, the state a moment."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.long_convolution.fft import circular
from zoo.ops.lti.call import Scan
from zoo.ops.lti.modes import power, times
from zoo.ops.lti.one_token import scan_one_token
from zoo.ops.lti.vandermonde import lti_kernel, lti_moments


def fft_refuses(*, packed: bool, **other: object) -> str | None:
    """Why transforms do not serve a call, or None."""
    return "serves rows of one sequence each, and cu_seqlens packs several" if packed else None


def scan_fft(x: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
    """x [B,T,D] -> y [B,T,D], final state [B,D,M,2]."""
    if x.numel() == 0:
        return scan.untouched(x)
    tokens, inner = x.shape[1], accumulation_dtype(x.dtype)
    if tokens == 1:
        return scan_one_token(x, scan)
    wide = x.to(inner)
    kernel = lti_kernel(scan.log_a, scan.c, tokens, dtype=inner)
    ahead = None
    if scan.c_reverse is not None:
        ahead = lti_kernel(scan.log_a, scan.c_reverse, tokens - scan.reverse_lag, dtype=inner)
    y = circular(wide, kernel, ahead, scan.reverse_lag)
    if scan.D is not None:
        y = y + scan.D.to(inner) * wide
    final = lti_moments(scan.log_a, wide.transpose(1, 2).flip(2))
    if scan.initial_state is not None:
        first = scan.initial_state.to(inner)
        first_pair = (first[..., 0], first[..., 1])
        c_re, c_im = scan.c.double().unbind(-1)
        next_re, next_im = times((c_re, c_im), power(scan.log_a, 1))
        seen = torch.stack(times((next_re.to(inner), next_im.to(inner)), first_pair), -1)  # [B,D,M,2]
        y = y + lti_kernel(scan.log_a, seen, tokens).transpose(1, 2)
        over_re, over_im = power(scan.log_a, tokens)
        final = final + torch.stack(times((over_re.to(inner), over_im.to(inner)), first_pair), -1)
    return y.to(x.dtype), final

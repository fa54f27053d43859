"""The definition of the diagonal time-invariant scan: powers of the modes, and the Toeplitz matrix they generate."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.long_convolution.reference import toeplitz
from zoo.ops.lti.call import Scan


def scan_reference(x: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
    """x [B,T,D] -> y [B,T,D], final state [B,D,M,2]. Any dtype, differentiable any number of times."""
    inner = accumulation_dtype(x.dtype)
    wide = x.to(inner)
    if scan.cu_seqlens is None:
        runs = [(slice(None), slice(0, x.shape[1]))]
    else:
        ends = scan.cu_seqlens.tolist()
        runs = [(slice(s, s + 1), slice(*bounds)) for s, bounds in enumerate(itertools.pairwise(ends))]
    outputs, finals = [], []
    for sequences, tokens in runs:
        before = None if scan.initial_state is None else scan.initial_state[sequences].to(inner)
        y, final = _one_run(wide[:, tokens], scan, before)
        outputs.append(y)
        finals.append(final)
    y = torch.cat(outputs, 1)
    if scan.D is not None:
        y = y + scan.D.to(inner) * wide
    return y.to(x.dtype), torch.cat(finals)


def _one_run(x: Tensor, scan: Scan, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whole sequences x [B,T,D] after the states `before` [B,D,M,2]."""
    tokens, inner = x.shape[1], x.dtype
    lags = torch.arange(tokens + 1, device=x.device, dtype=torch.float64)
    exponents = scan.log_a.double().unsqueeze(2) * lags[:, None]  # [D,M,T+1,2]
    size, angle = exponents[..., 0].exp(), exponents[..., 1]
    re, im = size * angle.cos(), size * angle.sin()  # [D,M,T+1]

    def response(c: Tensor) -> tuple[Tensor, Tensor]:
        """2 Re(c e^{l log_a} s) as a weight of s_re and one of s_im, [D,M,T+1] each."""
        c_re, c_im = c.double().unsqueeze(2).unbind(-1)
        return 2.0 * (c_re * re - c_im * im), -2.0 * (c_re * im + c_im * re)

    seen_re, seen_im = response(scan.c)
    kernel = seen_re[..., :tokens].sum(1).to(inner)
    ahead = None if scan.c_reverse is None else response(scan.c_reverse)[0][..., :tokens].sum(1).to(inner)
    y = toeplitz(x, kernel, ahead, scan.reverse_lag) if tokens > 0 else x
    into_re, into_im = (part[..., :tokens].flip(2).to(inner) for part in (re, im))
    state_re, state_im = (torch.einsum("dmt,btd->bdm", part, x) for part in (into_re, into_im))
    if before is not None:
        first_re, first_im = before.unbind(-1)
        y = y + torch.einsum("dmt,bdm->btd", seen_re[..., 1:].to(inner), first_re)
        y = y + torch.einsum("dmt,bdm->btd", seen_im[..., 1:].to(inner), first_im)
        over_re, over_im = re[..., tokens].to(inner), im[..., tokens].to(inner)
        state_re = state_re + over_re * first_re - over_im * first_im
        state_im = state_im + over_re * first_im + over_im * first_re
    return y, torch.stack([state_re, state_im], -1)

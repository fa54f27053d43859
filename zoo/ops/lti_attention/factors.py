"""What the chunks of LTI attention share: powers of the modes, in float64 until they are rounded once.

A phase l Im log_a of many turns keeps too few digits in float32: at l = 1,000 its error is 1e-4. The tables are small
(they know neither batch nor head width), so they are made in float64 for every input dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """Tables of one head each, in the accumulation dtype. M = N/2 modes; the last axis of 2 is (re, im).

    taps: [H,K], lag l of the kernel; the skip D is part of lag 0.
    write: [H,K,M,2], e^{(K-1-j) log_a}: what token j of a chunk leaves in the state at the chunk's end.
    read: [H,K,M,2], y_i = sum_n read_re S_re + read_im S_im of the state before the chunk: 2 Re(c e^{(i+1) log_a} S).
    """

    taps: Tensor
    write: Tensor
    read: Tensor


def powers(log_a: Tensor, first: int, count: int) -> Tensor:
    """e^{l log_a} for l = first .. first + count - 1: float64 pairs [H,count,M,2] of log_a [H,M,2]."""
    lags = torch.arange(first, first + count, device=log_a.device, dtype=torch.float64)
    return power_of(log_a.unsqueeze(1), lags[:, None])


def power_of(log_a: Tensor, lag: Tensor | int) -> Tensor:
    """e^{lag log_a} as float64 pairs: log_a [...,M,2], lag broadcast against [...,M]."""
    rate, turn = log_a.double().unbind(-1)
    size = (lag * rate).exp()
    return torch.stack([size * (lag * turn).cos(), size * (lag * turn).sin()], -1)


def times(a: Tensor, b: Tensor) -> Tensor:
    """Complex product of pairs [...,2]."""
    (a_re, a_im), (b_re, b_im) = a.unbind(-1), b.unbind(-1)
    return torch.stack([a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re], -1)


def chunk_factors(log_a: Tensor, c: Tensor, D: Tensor | None, chunk: int, dtype: torch.dtype) -> Factors:
    """The tables of chunks of K = `chunk` tokens, rounded to `dtype`. log_a, c: [H,M,2]. D: [H] or None."""
    raised = powers(log_a, 0, chunk + 1)  # [H,K+1,M,2]
    seen = 2.0 * times(raised, c.double().unsqueeze(1))
    taps = seen[:, :-1, :, 0].sum(-1)
    if D is not None:
        taps = torch.cat([taps[:, :1] + D.double().unsqueeze(1), taps[:, 1:]], 1)
    read = torch.stack([seen[:, 1:, :, 0], -seen[:, 1:, :, 1]], -1)
    return Factors(taps.to(dtype), raised[:, :-1].flip(1).to(dtype), read.to(dtype))


def kernel_taps(log_a: Tensor, c: Tensor, count: int) -> Tensor:
    """K_l = 2 Re sum_n c_n e^{l log_a_n} for l = 0 .. count - 1, float64 [H,count]. log_a, c: [H,M,2]."""
    return 2.0 * times(powers(log_a, 0, count), c.double().unsqueeze(1))[..., 0].sum(-1)


def toeplitz(taps: Tensor) -> Tensor:
    """Lower triangular T_ij = taps_{i-j}: [H,K] -> [H,K,K], exactly 0 above the diagonal."""
    steps = torch.arange(taps.shape[1], device=taps.device)
    lag = steps.unsqueeze(1) - steps
    return torch.where(lag >= 0, taps[:, lag.clamp(min=0)], 0.0)

"""The two state spaces of H3: initial values, discretisation, and the taps of the shift SSM."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_h3.config import H3Config

SLOWEST = 1e-4  # least decay rate -Re A at initialisation, and under "relu" always


def initial_modes(config: H3Config) -> tuple[Tensor, Tensor]:
    """Decay rates -Re A > 0 and frequencies Im A, [n_ssm,M] float32."""
    each = config.ssms // len(config.inits)
    parts = [_modes(kind, each, config.modes) for kind in config.inits]
    return torch.cat([rate for rate, _ in parts]), torch.cat([turn for _, turn in parts])


def _modes(kind: str, ssms: int, modes: int) -> tuple[Tensor, Tensor]:
    """Rates and frequencies of one family. Source: Gu et al. 2022 (2206.11893), section 4; H3's `dplr.py`."""
    n, width = torch.arange(modes, dtype=torch.float64), 2 * modes
    rate = torch.full_like(n, 0.5)
    if kind == "rand":
        return rate.float().repeat(ssms, 1), torch.randn(ssms, modes)
    if kind == "real":
        rate, turn = n + 1, torch.zeros_like(n)
    elif kind == "lin":
        turn = math.pi * n
    elif kind == "inv":
        turn = width / math.pi * (width / (2 * n + 1) - 1)
    elif kind == "inv2":
        turn = width / math.pi * (width / (n + 1) - 1)
    elif kind == "quad":
        turn = (2 * n + 1).square() / math.pi
    else:
        turn = legs_frequencies(width)
    return rate.float().repeat(ssms, 1), turn.float().repeat(ssms, 1)


def legs_frequencies(width: int) -> Tensor:
    """Frequencies of the normal part of HiPPO-LegS with N = `width`: the N/2 negative ones, ascending, float64.

    A + P P^T = -I/2 + skew with A_nk = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it, and P_n = sqrt(n + 1/2).
    """
    root = (2 * torch.arange(width, dtype=torch.float64) + 1).sqrt()
    pairs = 0.5 * torch.outer(root, root)
    skew = pairs.triu(1) - pairs.tril(-1)
    values: Tensor = torch.linalg.eigvalsh(torch.complex(torch.zeros_like(skew), -skew))
    return values[: width // 2]


def inverse_transform(rate: Tensor, kind: str) -> Tensor:
    """The parameter whose transform is `rate` > 0."""
    rate = rate.clamp(min=SLOWEST)
    if kind == "exp":
        return rate.log()
    if kind == "softplus":
        return rate + (-torch.expm1(-rate)).log()
    if kind == "sigmoid":
        return torch.logit(rate.clamp(max=1 - SLOWEST))
    return rate


def transform(parameter: Tensor, kind: str) -> Tensor:
    """Decay rate -Re A of the parameter."""
    if kind == "exp":
        return parameter.exp()
    if kind == "softplus":
        return F.softplus(parameter)
    if kind == "sigmoid":
        return parameter.sigmoid()
    return parameter.relu() + SLOWEST if kind == "relu" else parameter


def discretize(rate: Tensor, turn: Tensor, step: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Log of the transition and the input factor of x' = A x + u over time steps dt.

    rate, turn: -Re A and Im A, [H,M]. step: dt [H,1]. kind: "zoh" or "bilinear". All float64.
    Returns log Abar and Bbar / B, real pairs [H,M,2]:
    zoh: dt A and (e^{dt A} - 1) / A; bilinear: log((1 + dt A/2) / (1 - dt A/2)) and dt / (1 - dt A/2).
    """
    x, y = -rate * step, turn * step  # z = dt A
    if kind == "zoh":
        grown = torch.expm1(x) * y.cos() - 2 * (y / 2).sin().square(), x.exp() * y.sin()  # e^z - 1 without cancelling
        still = (x == 0) & (y == 0)  # where (e^z - 1) / z is 1
        inverse = step / torch.where(still, 1.0, x.square() + y.square())
        re = torch.where(still, step, (grown[0] * x + grown[1] * y) * inverse)
        im = (grown[1] * x - grown[0] * y) * inverse
        return torch.stack([x, y], -1), torch.stack([re, im], -1)
    half_x, half_y = x / 2, y / 2
    up, down = 1 + half_x, 1 - half_x
    up = torch.where((up == 0) & (half_y == 0), torch.finfo(up.dtype).eps, up)  # dt A = -2 forgets at once: log 0
    turned = half_y.square()
    below = down.square() + turned
    size = 0.5 * ((up.square() + turned) / below).log()
    angle = torch.atan2(half_y, up) + torch.atan2(half_y, down)
    inverse = step / below
    return torch.stack([size, angle], -1), torch.stack([down * inverse, half_y * inverse], -1)


def shift_taps(B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Taps of the shift SSM with its skip: K_j = sum_m B_m C_{m+j} (+ D at j = 0), [D,W] for lags 0 .. W-1.

    x_t = (x_{t-1} shifted by one) + B k_t and y_t = C x_t + D k_t. B, C: [D,W]. D: [D]. By transforms of 2 W points:
    multiplied out, the W^2 products of a channel would take longer than the rest of a decode step.
    """
    width = B.shape[1]
    spectra = torch.fft.rfft(torch.stack([C, B]), 2 * width)
    taps = torch.fft.irfft(spectra[0] * spectra[1].conj(), 2 * width)[:, :width]
    return torch.cat([taps[:, :1] + D.unsqueeze(1), taps[:, 1:]], 1)

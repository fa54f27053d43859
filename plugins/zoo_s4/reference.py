"""The layers of S4 and S4D written out, with explicit matrices and sums; the oracle of their tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo_s4.config import S4Config, S4dConfig, StateSpaceConfig

Weights = Mapping[str, Tensor]


def s4_layer(config: S4Config, weights: Weights, x: Tensor) -> Tensor:
    """x: [B,T,D]. weights: the mixer's parameters. Returns [B,T,D]. Meant for float64."""
    dt, a, B, C = _systems(config, weights)
    P = _tiled(torch.view_as_complex(weights["P"]).movedim(0, -1), config.d_model)  # [D,N/2,R]
    width = 2 * a.shape[1]
    A = torch.diag_embed(_both(a)) - _both(P) @ _both(P).mH
    step = torch.diag_embed(_both(dt.expand(a.shape)).to(a.dtype))
    identity = torch.eye(width, dtype=a.dtype)
    left = torch.linalg.inv(identity - step @ A / 2)
    A, B = left @ (identity + step @ A / 2), (left @ step @ _both(B).unsqueeze(-1)).squeeze(-1)
    scale = identity - torch.linalg.matrix_power(A, config.kernel_length)
    C = torch.cat([C, C.conj()], 2).unsqueeze(2) @ torch.linalg.inv(scale)  # [kernels,D,1,N]
    taps, state = [], B
    for _ in range(x.shape[1]):
        taps.append((C.squeeze(2) * state).sum(-1).real)
        state = (A @ state.unsqueeze(-1)).squeeze(-1)
    return _layer(config, weights, torch.stack(taps, -1), x)


def s4d_layer(config: S4dConfig, weights: Weights, x: Tensor) -> Tensor:
    """x: [B,T,D]. weights: the mixer's parameters. Returns [B,T,D]. Meant for float64."""
    dt, a, B, C = _systems(config, weights)
    z = dt * a
    if config.bandlimit is not None:
        C = C * (z.imag.abs() / (2 * torch.pi) < config.bandlimit / 2)
    if config.disc == "zoh":
        A, B = z.exp(), B * 2 * (z / 2).exp() * (z / 2).sinh() / a  # e^z - 1 without cancellation
    else:
        A, B = (1 + z / 2) / (1 - z / 2), B * dt / (1 - z / 2)
    taps, state = [], B
    for _ in range(x.shape[1]):
        taps.append(2 * (C * state).sum(-1).real)
        state = A * state
    return _layer(config, weights, torch.stack(taps, -1), x)


def _both(part: Tensor) -> Tensor:
    """[D,N/2,...] and its conjugate, [D,N,...]."""
    return torch.cat([part, part.conj()], 1)


def _systems(config: StateSpaceConfig, weights: Weights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dt [D,.], a [D,N/2], B [D,N/2] and C [kernels,D,N/2]."""
    real = isinstance(config, S4dConfig) and config.real
    pair = (lambda part: torch.complex(part, torch.zeros_like(part))) if real else torch.view_as_complex
    imag = torch.zeros_like(weights["A_real"]) if real else _number(weights["A_imag"], config.imag_transform)
    a = -torch.complex(_number(weights["A_real"], config.real_transform), imag)
    a = _tiled(a, config.d_model)
    B = _tiled(pair(weights["B"])[0], config.d_model) if "B" in weights else torch.ones_like(a)
    return _number(weights["inv_dt"], config.dt_transform), a, B, pair(weights["C"])


def _number(parameter: Tensor, transform: str) -> Tensor:
    if transform == "exp":
        return torch.exp(parameter)
    if transform == "softplus":
        return torch.log(1 + torch.exp(parameter))
    if transform == "relu":
        return parameter.clamp(min=0) + 1e-4
    return 1 / (1 + torch.exp(-parameter)) if transform == "sigmoid" else parameter


def _tiled(part: Tensor, channels: int) -> Tensor:
    """Channel d has system d mod S."""
    return part[torch.arange(channels) % part.shape[0]]


def _layer(config: StateSpaceConfig, weights: Weights, taps: Tensor, x: Tensor) -> Tensor:
    """Sums over taps [kernels,D,T] term by term, then skip, activation and output map."""
    length, outputs = x.shape[1], []
    for c in range(config.channels):
        tokens = []
        for t in range(length):
            now = weights["D"][c] * x[:, t] + sum(taps[c, :, t - s] * x[:, s] for s in range(t + 1))
            if not config.causal:
                now = now + sum(taps[config.channels + c, :, s - t - 1] * x[:, s] for s in range(t + 1, length))
            tokens.append(now)
        outputs.append(torch.stack(tokens, 1))
    y = torch.cat(outputs, -1)
    if config.activation == "gelu":
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
    elif config.activation == "silu":
        y = y / (1 + torch.exp(-y))
    elif config.activation == "relu":
        y = y.clamp(min=0)
    if config.output == "none":
        return y
    y = y @ weights["output_linear.weight"].T
    if config.bias:
        y = y + weights["output_linear.bias"]
    if config.output == "linear":
        return y
    half = config.d_model
    return y[..., :half] / (1 + torch.exp(-y[..., half:]))

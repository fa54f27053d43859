"""Random features phi of softmax's kernel: <phi(q), phi(k)> is exp(<q, k> / sqrt(N)) on average over projections.

With x' = N^-1/4 x and the rows w of the projection: positive features are M^-1/2 exp(<w, x'> - |x'|^2 / 2);
hyperbolic ones take w and -w; ReLU features are max(<w, x'>, 0) + eps. Exponential features are handled as logarithms
here, without the factor M^-1/2, which cancels in every quotient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.errors import ConfigError, unknown_name
from sequence_mixer.shapes import accumulation_dtype

FEATURES = ("positive", "hyperbolic", "relu")


def expect_features(name: str) -> None:
    """Raise ConfigError, with the closest name, if there are no features `name`."""
    if name not in FEATURES:
        raise ConfigError(unknown_name("random features", name, FEATURES))


def feature_count(rows: int, features: str) -> int:
    """Features M of a projection with that many rows: twice as many if hyperbolic."""
    return 2 * rows if features == "hyperbolic" else rows


def empty_maximum(dtype: torch.dtype) -> float:
    """The running maximum of a state without keys: the least finite number of its dtype."""
    return float(torch.finfo(dtype).min)


def projected(x: Tensor, projection: Tensor, features: str) -> Tensor:
    """<w, x'> of x [B,T,H,N] for every feature, [B,T,H,M], in the accumulation dtype."""
    inner = accumulation_dtype(x.dtype)
    dash = (x.to(inner) * x.shape[-1] ** -0.25) @ projection.to(inner).mT
    return torch.cat([dash, -dash], -1) if features == "hyperbolic" else dash


def half_square(x: Tensor) -> Tensor:
    """|x'|^2 / 2 of x [B,T,H,N], [B,T,H,1], in the accumulation dtype."""
    scale: float = 0.5 * x.shape[-1] ** -0.5
    return x.to(accumulation_dtype(x.dtype)).square().sum(-1, keepdim=True) * scale


def log_features(x: Tensor, projection: Tensor, features: str) -> Tensor:
    """Logarithms of M^1/2 phi(x), [B,T,H,M], of positive or hyperbolic features."""
    return projected(x, projection, features) - half_square(x)


def relu_features(x: Tensor, projection: Tensor, feature_eps: float) -> Tensor:
    """phi(x) [B,T,H,M] of ReLU features."""
    return projected(x, projection, "relu").relu() + feature_eps


def quotient(sums: Tensor, log_scale: Tensor | float, count: int, eps: float) -> Tensor:
    """y [..., P] from sums [..., P+1] of weights: num / (den + eps), weights being those of phi.

    log_scale: the sums are those of M phi(q) phi(k), times exp(-log_scale).
    count: M; 1 for sums of phi(q) phi(k) itself.
    A row whose weights are all 0 (no keys) gives 0.
    """
    total = sums[..., -1:]
    if eps:
        scale = log_scale if isinstance(log_scale, Tensor) else sums.new_full((), log_scale)
        total = total + (eps * count) * (-scale).exp()
    return sums[..., :-1] / torch.where(total > 0, total, 1.0)

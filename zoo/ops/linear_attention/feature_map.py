"""Elementwise feature maps phi of linear attention, in the accumulation dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from sequence_mixer.errors import ConfigError, unknown_name
from sequence_mixer.shapes import accumulation_dtype


def elu_plus_one(x: Tensor) -> Tensor:
    """x + 1 above 0, exp(x) below: never the sum exp(x) - 1 + 1, which loses every digit of a small feature."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def squared_relu(x: Tensor) -> Tensor:
    return x.relu().square()


def identity(x: Tensor) -> Tensor:
    return x


FEATURE_MAPS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "identity": identity,
        "elu_plus_one": elu_plus_one,
        "relu": F.relu,
        "silu": F.silu,
        "squared_relu": squared_relu,
    }
)


def expect_feature_map(name: str) -> None:
    """Raise ConfigError, with the closest name, if there is no feature map `name`."""
    if name not in FEATURE_MAPS:
        raise ConfigError(unknown_name("feature map", name, tuple(FEATURE_MAPS)))


def features(x: Tensor, name: str) -> Tensor:
    """phi(x), of the shape of x, in the accumulation dtype."""
    return FEATURE_MAPS[name](x.to(accumulation_dtype(x.dtype)))


def key_features(k: Tensor, name: str, heads: int, padding_mask: Tensor | None) -> Tensor:
    """phi(k) [B,K,H,N] for every query head, from k [B,K,G,N]; 0 in padded slots (phi(0) need not be 0)."""
    mapped = features(k, name)
    if padding_mask is not None:
        mapped = mapped.masked_fill(~padding_mask[:, :, None, None], 0.0)
    return for_every_head(mapped, heads)


def for_every_head(part: Tensor, heads: int) -> Tensor:
    """[B,K,G,X] -> [B,K,H,X]; query head h reads group h // (H / G)."""
    return part if part.shape[2] == heads else part.repeat_interleave(heads // part.shape[2], 2)

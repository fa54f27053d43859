"""The linear attention layer written out, with the whole matrix of weights; the oracle of its tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from zoo_linear_attention.config import LinearAttentionConfig

MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu_plus_one": lambda x: torch.expm1(x.clamp(max=0)) + x.clamp(min=0) + 1,
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + (-x).exp()),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
}


def linear_attention_layer(config: LinearAttentionConfig, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """x: [B,T,D], any floating dtype. weights: the mixer's state dict. Returns [B,T,D]."""
    inner, width, phi = config.heads * config.width, config.width, MAPS[config.feature_map]
    projected = _linear(x, weights, "in_proj")
    outputs = []
    for h in range(config.heads):
        q, k, v = (projected[..., n * inner + h * width :][..., :width] for n in range(3))
        weight = config.scale * (phi(q) @ phi(k).mT)  # [B,T,T]
        if config.causal:
            weight = weight.tril()
        mixed = weight @ v
        outputs.append(mixed / (weight.sum(-1, keepdim=True) + config.eps) if config.normalize else mixed)
    return _linear(torch.cat(outputs, -1), weights, "out_proj")


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

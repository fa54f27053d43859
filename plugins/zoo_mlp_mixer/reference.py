"""The token-mixing layer written out, channel by channel; the oracle of its tests."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from zoo_mlp_mixer.config import MlpMixerConfig


def mlp_mixer_layer(config: MlpMixerConfig, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """x: [B,T,D], any floating dtype. weights: the mixer's state dict. Returns [B,T,D]."""
    tokens = x.shape[1]
    units = tokens if config.causal else config.hidden
    values = x
    if config.pre_norm:
        centred = x - x.mean(-1, keepdim=True)
        values = centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        values = values * weights["norm1.weight"] + weights["norm1.bias"]
    w1, w2 = weights["mlp_tokens.fc1.weight"][:units, :tokens], weights["mlp_tokens.fc2.weight"][:tokens, :units]
    if config.causal:
        sees = torch.arange(tokens)[:, None] >= torch.arange(tokens)
        w1, w2 = torch.where(sees, w1, 0), torch.where(sees, w2, 0)
    b1, b2 = x.new_zeros(units), x.new_zeros(tokens)
    if config.bias:
        b1, b2 = weights["mlp_tokens.fc1.bias"][:units], weights["mlp_tokens.fc2.bias"][:tokens]
    channels = [
        w2 @ _gelu(w1 @ column + b1[:, None], config.activation) + b2[:, None] for column in values.split(1, -1)
    ]
    y = torch.cat(channels, -1)
    return x + y if config.residual else y


def _gelu(a: Tensor, activation: str) -> Tensor:
    if activation == "gelu_erf":
        return a * (1 + (a / math.sqrt(2)).erf()) / 2
    return a * (1 + (math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)).tanh()) / 2

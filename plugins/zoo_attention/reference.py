"""The attention layer written out, one sequence and one query at a time; the oracle of its tests."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from zoo_attention.config import AttentionConfig


def attention_layer(config: AttentionConfig, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """x: [B,T,D], any floating dtype. weights: the mixer's state dict. Returns [B,T,D]."""
    heads, groups, width = config.heads, config.kv_heads, config.width
    scale = 1 / math.sqrt(width) if config.scale is None else config.scale
    projected = _linear(x, weights, "in_proj")
    queries = projected[..., : heads * width]
    keys = projected[..., heads * width : (heads + groups) * width]
    values = projected[..., (heads + groups) * width :]
    rows = []
    for b in range(x.shape[0]):
        outputs = []
        for h in range(heads):
            g = h // (heads // groups)
            q = _turned(config, queries[b, :, h * width : (h + 1) * width])
            k = _turned(config, keys[b, :, g * width : (g + 1) * width])
            v = values[b, :, g * width : (g + 1) * width]
            mixed = []
            for i in range(x.shape[1]):
                seen = slice(0, i + 1) if config.causal else slice(None)
                weight = (scale * (k[seen] @ q[i])).exp()
                mixed.append((weight / weight.sum()) @ v[seen])
            outputs.append(torch.stack(mixed))
        rows.append(torch.cat(outputs, -1))
    return _linear(torch.stack(rows), weights, "out_proj")


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _turned(config: AttentionConfig, x: Tensor) -> Tensor:
    """[T,P]: pair r of token t as a complex number times exp(i t base^(-2r/P))."""
    if config.rope == "none":
        return x
    pairs = config.width // 2
    columns = []
    for r in range(pairs):
        one, other = (r, r + pairs) if config.rope == "half" else (2 * r, 2 * r + 1)
        angle = torch.tensor(
            [t * config.rope_base ** (-2 * r / config.width) for t in range(x.shape[0])], dtype=torch.float64
        )
        turned = torch.complex(x[:, one].double(), x[:, other].double()) * torch.polar(torch.ones_like(angle), angle)
        columns += [(one, turned.real.to(x.dtype)), (other, turned.imag.to(x.dtype))]
    return torch.stack([column for _, column in sorted(columns, key=lambda pair: pair[0])], -1)

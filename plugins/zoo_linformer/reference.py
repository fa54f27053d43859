"""The Linformer layer written out, head by head; the oracle of its tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo_linformer.config import LinformerConfig


def linformer_layer(config: LinformerConfig, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """x: [B,T,D], any floating dtype. weights: the mixer's state dict. Returns [B,T,D]."""
    width, heads, groups = config.width, config.heads, config.kv_heads
    projected = _linear(x, weights, "in_proj")
    outputs = []
    for h in range(heads):
        g = h // (heads // groups)
        first_key, first_value = heads + g, heads + g + (0 if config.tie_values else groups)
        q, k, v = (projected[..., n * width : (n + 1) * width] for n in (h, first_key, first_value))
        keys, values = shorten(config, weights, "proj_k", g, k), shorten(config, weights, "proj_v", g, v)
        outputs.append((q @ keys.mT * width**-0.5).softmax(-1) @ values)
    return _linear(torch.cat(outputs, -1), weights, "out_proj")


def shorten(config: LinformerConfig, weights: Mapping[str, Tensor], name: str, g: int, x: Tensor) -> Tensor:
    """Keys or values of one head, x [B,T,P], projected along the length: [B,R,P]."""
    if config.projection in ("mean_pool", "max_pool"):
        pieces = x.split(config.window, 1)
        pool = [piece.mean(1) if config.projection == "mean_pool" else piece.max(1).values for piece in pieces]
        return torch.stack(pool, 1)
    weight = weights["proj_k" if config.sharing in ("kv", "layerwise") else name]
    weight = weight[g] if config.sharing == "none" else weight
    if config.projection == "linear":
        return weight[: x.shape[1]].T @ x
    pieces = x.split(config.window, 1)
    return torch.stack([weight[: piece.shape[1]] @ piece for piece in pieces], 1)


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

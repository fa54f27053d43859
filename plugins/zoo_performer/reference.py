"""The Performer layer written out, with the whole matrix of weights; the oracle of its tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo_performer.config import PerformerConfig


def performer_layer(config: PerformerConfig, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """x: [B,T,D], any floating dtype. weights: the mixer's state dict. Returns [B,T,D].

    Features are not stabilised (but for compat="jax"), so inputs have to be of ordinary size.
    """
    heads, groups, width = config.heads, config.kv_heads, config.width
    projected = _linear(x, weights, "in_proj")
    rows = weights["projection"]
    if config.feature_map == "hyperbolic":
        rows = torch.cat([rows, -rows])
    outputs = []
    for h in range(heads):
        g = h // (heads // groups)
        places = (h, heads + g, heads + groups + g)
        q, k, v = (projected[..., n * width : (n + 1) * width] for n in places)
        phi_q, phi_k = _features(config, rows, q, -1), _features(config, rows, k, (-2, -1))
        weight = phi_q @ phi_k.mT  # [B,T,T]
        if config.causal:
            weight = weight.tril()
        total = weight.sum(-1, keepdim=True) + config.eps + config.key_eps * phi_q.sum(-1, keepdim=True)
        outputs.append(weight @ v / total)
    return _linear(torch.cat(outputs, -1), weights, "out_proj")


def _features(config: PerformerConfig, rows: Tensor, x: Tensor, axes: int | tuple[int, int]) -> Tensor:
    """phi(x) [B,T,M] of x [B,T,P]; the JAX stabiliser is the maximum over `axes`."""
    x = x * config.width**-0.25
    dash = x @ rows.T
    if config.feature_map == "relu":
        return dash.clamp(min=0) + config.added_to_features
    log = dash - x.square().sum(-1, keepdim=True) / 2
    if config.compat == "jax":
        log = log - dash.detach().amax(axes, keepdim=True)
    phi: Tensor = (log.exp() + config.added_to_features) * rows.shape[0] ** -0.5
    return phi


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

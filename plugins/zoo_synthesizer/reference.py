"""The synthesizer layer written out, one sequence, head and query at a time; the oracle of its tests."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from zoo_synthesizer.config import SynthesizerConfig


def synthesizer_layer(config: SynthesizerConfig, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """x: [B,T,D], any floating dtype. weights: the mixer's state dict. Returns [B,T,D]."""
    width = config.width
    values = _linear(x, weights, "v_proj")
    rows = []
    for b in range(x.shape[0]):
        outputs = []
        for h in range(config.heads):
            logits = layer_logits(config, weights, x[b], h)
            mixed = []
            for i in range(x.shape[1]):
                seen = slice(0, i + 1) if config.causal else slice(None)
                weight = logits[i, seen].exp()
                mixed.append((weight / weight.sum()) @ values[b, seen, h * width : (h + 1) * width])
            outputs.append(torch.stack(mixed))
        rows.append(torch.cat(outputs, -1))
    return _linear(torch.stack(rows), weights, "out_proj")


def layer_logits(config: SynthesizerConfig, weights: Mapping[str, Tensor], x: Tensor, head: int) -> Tensor:
    """Mixed logits of one head, [T,T], for one sequence x [T,D]."""
    alpha = [1.0] if len(config.parts) == 1 else weights["logits.alpha_logits"].softmax(0)
    total = torch.zeros(x.shape[0], x.shape[0], dtype=x.dtype)
    for share, part in zip(alpha, config.parts, strict=True):
        total = total + share * _part_logits(config, weights, x, head, part)
    return total


def _part_logits(config: SynthesizerConfig, weights: Mapping[str, Tensor], x: Tensor, head: int, part: str) -> Tensor:
    tokens, name = x.shape[0], f"logits.{part}"
    own = slice(head * config.width, (head + 1) * config.width)
    if part == "random":
        table: Tensor = weights[f"{name}.table"]
        return table[head, :tokens, :tokens]
    if part == "factorised_random":
        r1, r2 = weights[f"{name}.r1"], weights[f"{name}.r2"]
        return r1[head, :tokens] @ r2[head, :tokens].T
    if part == "vanilla":
        q, k = _linear(x, weights, f"{name}.q_proj")[:, own], _linear(x, weights, f"{name}.k_proj")[:, own]
        return q @ k.T / math.sqrt(config.width)
    if part == "dense":
        shared = _linear(x, weights, "logits.vanilla.q_proj")[:, own] if config.shares_queries else None
        return _dense_map(weights, x, head, name, shared)[:, :tokens]
    left, right = _dense_map(weights, x, head, f"{name}.left"), _dense_map(weights, x, head, f"{name}.right")
    columns = right.shape[1]
    return torch.stack([left[:, j // columns] * right[:, j % columns] for j in range(tokens)], 1)


def _dense_map(
    weights: Mapping[str, Tensor], x: Tensor, head: int, name: str, before_relu: Tensor | None = None
) -> Tensor:
    """w2 relu(w1 x + b1) + b2 of one head, [T,size]; a w2 of one head serves all."""
    if before_relu is None:
        before_relu = x @ weights[f"{name}.w1"][head].T
        if f"{name}.b1" in weights:
            before_relu = before_relu + weights[f"{name}.b1"][head]
    w2 = weights[f"{name}.w2"]
    own = head if w2.shape[0] > 1 else 0
    out: Tensor = before_relu.clamp(min=0) @ w2[own].T
    return out + weights[f"{name}.b2"][own] if f"{name}.b2" in weights else out


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    y: Tensor = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

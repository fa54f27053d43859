"""Self-attention layers of performer-pytorch, as our config and weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sequence_mixer.errors import ReferenceMismatch, unknown_name
from sequence_mixer.peer_options import PeerOptions, config_of, expect_weights
from zoo_performer.config import PerformerConfig

PEERS = ("SelfAttention",)
LEAK = (
    "with softmax features and causal=True its key maximum runs over the whole sequence, and the epsilon beside it "
    "lets future keys change past outputs; a causal mixer does not reproduce that. Build ours with "
    "feature_map='positive' and load the projections"
)
SOFTMAX_EPS, RELU_EPS, CAUSAL_EPS = 1e-4, 1e-3, 1e-6  # what the layer adds: to features, and to a causal normaliser


def convert(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[PerformerConfig, dict[str, Tensor]]:
    """Config and state dict of our mixer for a reference module.

    peer: "SelfAttention" (performer-pytorch).
    config: its arguments, with `feature_redraw_interval` of the Performer around it and `ortho_scaling` of the
        FastAttention inside it; `B` and `T`, the sizes of a recorded call, are not looked at.
    state_dict: its weights, under its own names.
    Raises ReferenceMismatch.
    """
    if peer not in PEERS:
        raise ReferenceMismatch(unknown_name("reference module of performer", peer, PEERS))
    options = PeerOptions(peer, config)
    options.ignore("B", "T")
    d_model, heads, width = options.take("dim"), options.take("heads", 8), options.take("dim_head", 64)
    causal, generalized = options.take("causal", False), options.take("generalized_attention", False)
    features = options.take("nb_features", None)
    redraw = options.take("feature_redraw_interval", 1000)
    norms = options.expect("ortho_scaling", 0, 0, 1, why="rows have norms chi (0) or P^1/2 (1)")
    qkv_bias, out_bias = options.take("qkv_bias", False), options.take("attn_out_bias", True)
    options.expect("local_heads", 0, 0, why="there is no local attention here")
    options.ignore("local_window_size")  # of the local heads
    options.expect("no_projection", False, False, why="softmaxed queries and keys are no random features")
    options.expect("dropout", 0.0, 0.0, 0, why="dropout belongs to the block around a mixer")
    kernel = options.take("kernel_fn", "ReLU")
    if generalized and str(kernel).removesuffix("()") not in ("ReLU", "relu"):
        raise ReferenceMismatch(f"{peer}: kernel_fn={kernel!r} is not reproduced; wanted 'ReLU'")
    options.done()
    if causal and not generalized:
        raise ReferenceMismatch(f"{peer}: {LEAK}")
    parts = ["to_q", "to_k", "to_v"]
    names = [f"{part}.weight" for part in parts] + ["to_out.weight", "fast_attention.projection_matrix"]
    names += [f"{part}.bias" for part in parts if qkv_bias] + ["to_out.bias"] * bool(out_bias)
    given = dict(zip(names, expect_weights(peer, state_dict, names), strict=True))
    made = config_of(
        peer,
        PerformerConfig,
        d_model=d_model,
        n_heads=heads,
        head_dim=width,
        n_features=features or int(width * math.log(width)),
        feature_map="relu" if generalized else "positive",
        projection_norms="sqrt" if norms else "chi",
        redraw_interval=redraw,
        causal=causal,
        bias=qkv_bias,
        out_bias=out_bias,
        feature_eps=RELU_EPS if generalized else SOFTMAX_EPS,
        key_eps=CAUSAL_EPS if causal else 0.0,
        compat=None if generalized else "jax",
    )
    return made, _weights(given, parts)


def _weights(given: Mapping[str, Tensor], parts: list[str]) -> dict[str, Tensor]:
    """Their weights under our names; queries, keys and values are rows of one projection."""
    import torch

    weights = {"projection": given["fast_attention.projection_matrix"]}
    for kind in ("weight", "bias"):
        if f"to_q.{kind}" in given:
            weights[f"in_proj.{kind}"] = torch.cat([given[f"{part}.{kind}"] for part in parts])
        if f"to_out.{kind}" in given:
            weights[f"out_proj.{kind}"] = given[f"to_out.{kind}"]
    return weights

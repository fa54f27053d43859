"""Token mixing of timm's MLP-Mixer, as our config and weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sequence_mixer.errors import ReferenceMismatch, unknown_name
from sequence_mixer.peer_options import PeerOptions, config_of, expect_weights
from zoo_mlp_mixer.config import NORM_EPS, MlpMixerConfig

BLOCK = "MixerBlock (norm1 + mlp_tokens + residual)"
INNER = "MixerBlock.mlp_tokens"
ACTIVATIONS = ("gelu_erf", "gelu_tanh")
NO_DROPOUT = "a mixer holds no dropout; put it in the block around it"
LAYERS = [f"fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]


def convert(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[MlpMixerConfig, dict[str, Tensor]]:
    """Config and state dict of our mixer for a reference module.

    peer: the token part of timm's MixerBlock, "MixerBlock (norm1 + mlp_tokens + residual)", which is
        x + mlp_tokens(norm1(x)^T)^T, or "MixerBlock.mlp_tokens", the MLP over tokens alone.
    config: dim, seq_len, tokens_dim (or mlp_ratio, whose first number times dim it is), act ("gelu_erf", its default,
        or "gelu_tanh"), and for the block norm ("LayerNorm(eps=1e-6)", its default, or another eps). `B` and `T`, the
        sizes of a recorded call, are not looked at.
    state_dict: its weights, under its own names: norm1.*, mlp_tokens.fc1.*, ... of the block, fc1.*, fc2.* of the MLP.
    Raises ReferenceMismatch.
    """
    if peer not in (BLOCK, INNER):
        raise ReferenceMismatch(unknown_name("reference module of mlp_mixer", peer, (BLOCK, INNER)))
    options, whole = PeerOptions(peer, config), peer == BLOCK
    d_model, max_length = options.take("dim"), options.take("seq_len")
    hidden, ratios = options.take("tokens_dim", None), options.take("mlp_ratio", (0.5, 4.0))
    if hidden is None:
        hidden = int((ratios[0] if isinstance(ratios, tuple | list) else ratios) * d_model)
    activation = options.expect("act", "gelu_erf", *ACTIVATIONS, why="the token MLP has a GELU")
    norm_eps = _norm_eps(peer, options.take("norm", "LayerNorm(eps=1e-6)"))
    options.expect("drop", 0.0, 0.0, 0, why=NO_DROPOUT)
    options.expect("drop_path", 0.0, 0.0, 0, why=NO_DROPOUT)
    options.ignore("B", "T")
    options.done()
    ours = config_of(
        peer,
        MlpMixerConfig,
        d_model=d_model,
        max_length=max_length,
        tokens_dim=hidden,
        activation=activation,
        pre_norm=whole,
        norm_eps=norm_eps if whole else NORM_EPS,  # the MLP alone has no norm
        residual=whole,
    )
    if not whole:
        weights = expect_weights(peer, state_dict, LAYERS)
        return ours, {f"mlp_tokens.{name}": weight for name, weight in zip(LAYERS, weights, strict=True)}
    names = ["norm1.weight", "norm1.bias", *(f"mlp_tokens.{name}" for name in LAYERS)]
    return ours, dict(zip(names, expect_weights(peer, state_dict, names), strict=True))


def _norm_eps(peer: str, norm: object) -> float:
    found = re.fullmatch(r"LayerNorm\(eps=(\d+(?:\.\d*)?(?:e-?\d+)?)\)", str(norm))
    if found is None:
        raise ReferenceMismatch(f"{peer}: norm={norm!r} is not reproduced; wanted 'LayerNorm(eps=...)'")
    return float(found.group(1))

"""Linear attention layers of fast-transformers, as our config and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sequence_mixer.errors import ReferenceMismatch, unknown_name
from sequence_mixer.peer_options import PeerOptions, config_of, read_attention_layer
from zoo_linear_attention.config import LinearAttentionConfig

PEERS = {"AttentionLayer(LinearAttention)": False, "AttentionLayer(CausalLinearAttention)": True}  # causal


def convert(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[LinearAttentionConfig, dict[str, Tensor]]:
    """Config and state dict of our mixer for a reference module.

    peer: "AttentionLayer(LinearAttention)" or "AttentionLayer(CausalLinearAttention)" (fast-transformers).
    config: the arguments of AttentionLayer under "layer", those of the attention under "inner". `causal` may be
        given and must be that of the class; `B`, `T` and `lengths`, the sizes of a recorded call, are not looked at.
    state_dict: its weights, under its own names.
    Raises ReferenceMismatch.
    """
    if peer not in PEERS:
        raise ReferenceMismatch(unknown_name("reference module of linear_attention", peer, tuple(PEERS)))
    causal = PEERS[peer]
    options = PeerOptions(peer, config)
    options.expect("causal", causal, causal, why="the class fixes it")
    options.ignore("B", "T", "lengths")
    layer, inner = options.nested("layer"), options.nested("inner")
    options.done()
    sizes, weights = read_attention_layer(layer, state_dict, "CausalLinearAttention" if causal else "LinearAttention")
    inner.expect("query_dimensions", sizes["head_dim"], sizes["head_dim"], why="it is the width of the keys")
    inner.expect("feature_map", None, None, "elu(x)+1", why="its default, elu(x) + 1, is the map read here")
    eps = inner.take("eps", 1e-6)
    inner.ignore("event_dispatcher")
    inner.done()
    return config_of(
        peer, LinearAttentionConfig, **sizes, causal=causal, bias=True, eps=eps, feature_map="elu_plus_one"
    ), weights

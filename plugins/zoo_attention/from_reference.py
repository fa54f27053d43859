"""Attention layers of other libraries, as our config and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sequence_mixer.errors import ReferenceMismatch, unknown_name
from sequence_mixer.peer_options import PeerOptions, config_of, expect_weights, read_attention_layer
from zoo_attention.config import AttentionConfig

PEERS = ("torch.nn.MultiheadAttention", "AttentionLayer(FullAttention)")
NO_DROPOUT = "a mixer holds no dropout; put it in the block around it"


def convert(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[AttentionConfig, dict[str, Tensor]]:
    """Config and state dict of our mixer for a reference module.

    peer: "torch.nn.MultiheadAttention" or "AttentionLayer(FullAttention)" (fast-transformers).
    config: its constructor arguments; those of AttentionLayer under "layer", those of FullAttention under "inner".
        Neither has an argument for what is an argument of its call: `causal` (default False) says whether the
        calls mask the future. `B`, `T` and `lengths`, the sizes of a recorded call, are not looked at.
    state_dict: its weights, under its own names.
    Raises ReferenceMismatch.
    """
    if peer not in PEERS:
        raise ReferenceMismatch(unknown_name("reference module of attention", peer, PEERS))
    options = PeerOptions(peer, config)
    causal = bool(options.take("causal", False))
    options.ignore("B", "T", "lengths")
    read = _multihead_attention if peer == PEERS[0] else _full_attention
    return read(options, causal, state_dict)


def _multihead_attention(
    options: PeerOptions, causal: bool, state_dict: Mapping[str, Tensor]
) -> tuple[AttentionConfig, dict[str, Tensor]]:
    d_model, heads = options.take("embed_dim"), options.take("num_heads")
    bias = bool(options.take("bias", True))
    options.expect("dropout", 0.0, 0.0, 0, why=NO_DROPOUT)
    options.expect("add_bias_kv", False, False, why="keys and values come from the input alone")
    options.expect("add_zero_attn", False, False, why="keys and values come from the input alone")
    for name in ("kdim", "vdim"):
        options.expect(name, None, None, d_model, why="queries, keys and values come from one input")
    options.ignore("batch_first", "device", "dtype")  # layout of its inputs; dtype and device are those of the weights
    options.done()
    ours = {"in_proj.weight": "in_proj_weight", "out_proj.weight": "out_proj.weight"}
    if bias:
        ours |= {"in_proj.bias": "in_proj_bias", "out_proj.bias": "out_proj.bias"}
    weights = expect_weights(options.peer, state_dict, list(ours.values()))
    made = config_of(
        options.peer, AttentionConfig, d_model=d_model, n_heads=heads, causal=causal, bias=bias, rope="none"
    )
    return made, dict(zip(ours, weights, strict=True))


def _full_attention(
    options: PeerOptions, causal: bool, state_dict: Mapping[str, Tensor]
) -> tuple[AttentionConfig, dict[str, Tensor]]:
    layer, inner = options.nested("layer"), options.nested("inner")
    options.done()
    sizes, weights = read_attention_layer(layer, state_dict, "FullAttention")
    scale = inner.take("softmax_temp", None) or None  # 0 stands for its default too
    inner.expect("attention_dropout", 0.1, 0.0, 0, why=NO_DROPOUT)
    inner.ignore("event_dispatcher")
    inner.done()
    return config_of(
        options.peer, AttentionConfig, **sizes, causal=causal, bias=True, rope="none", scale=scale
    ), weights

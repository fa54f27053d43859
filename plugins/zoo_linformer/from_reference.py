"""The Linformer layer of lucidrains/linformer, as our config and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sequence_mixer.errors import ReferenceMismatch, unknown_name
from sequence_mixer.peer_options import PeerOptions, config_of, expect_weights
from zoo_linformer.config import LinformerConfig

PEERS = ("LinformerSelfAttention",)


def convert(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[LinformerConfig, dict[str, Tensor]]:
    """Config and state dict of our mixer for a reference module.

    peer: "LinformerSelfAttention" (lucidrains/linformer). config: its constructor arguments; `B` and `T`, the sizes of
        a recorded call, are not looked at. state_dict: its weights, under its own names.
    Raises ReferenceMismatch.
    """
    if peer not in PEERS:
        raise ReferenceMismatch(unknown_name("reference module of linformer", peer, PEERS))
    options = PeerOptions(peer, config)
    d_model, max_length = options.take("dim"), options.take("seq_len")
    rank, heads = options.take("k", 256), options.take("heads", 8)
    head_dim = options.take("dim_head", None)
    one_head, tied = bool(options.take("one_kv_head", False)), bool(options.take("share_kv", False))
    options.expect("dropout", 0.0, 0.0, 0, why="a mixer holds no dropout; put it in the block around it")
    options.ignore("B", "T")
    options.done()
    ours = config_of(
        peer,
        LinformerConfig,
        d_model=d_model,
        n_heads=heads,
        head_dim=head_dim,
        n_kv_heads=1 if one_head else None,
        max_length=max_length,
        rank=rank,
        share="kv" if tied else "headwise",
        tie_values=tied,
    )
    inputs = ["to_q.weight", "to_k.weight"] + ["to_v.weight"] * (not tied)
    lengths = ["proj_k"] + ["proj_v"] * (not tied)
    weights = expect_weights(peer, state_dict, [*inputs, *lengths, "to_out.weight", "to_out.bias"])
    named = dict(zip([*lengths, "out_proj.weight", "out_proj.bias"], weights[len(inputs) :], strict=True))
    return ours, {"in_proj.weight": torch.cat(weights[: len(inputs)]), **named}

"""Mamba-1 layers of other packages, as our config and weights; the weights have the same names everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sequence_mixer.errors import ReferenceMismatch, unknown_name
from sequence_mixer.peer_options import PeerOptions, config_of
from zoo_mamba.config import MambaConfig


def from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[MambaConfig, dict[str, Tensor]]:
    """Our config and state dict for a reference layer.

    peer: "Mamba" (mamba_ssm) or "MambaMixer" (transformers).
    config: its own constructor arguments; those left out have its defaults. `B` and `T`, the sizes of a recorded call,
        are not looked at.
    state_dict: its weights.
    Raises ReferenceMismatch, in words, for an unknown peer or argument and for a value that we do not reproduce.
    """
    if peer not in PEERS:
        raise ReferenceMismatch(unknown_name("reference module of mamba", peer, list(PEERS)))
    options = PeerOptions(peer, config)
    options.ignore("B", "T")
    fields = PEERS[peer](options)
    options.done()
    return config_of(peer, MambaConfig, **fields), dict(state_dict)


def _mamba(options: PeerOptions) -> dict[str, Any]:
    """mamba_ssm/modules/mamba_simple.py."""
    options.ignore("use_fast_path", "layer_idx", "device", "dtype")
    defaults = {
        "d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "dt_min": 0.001, "dt_max": 0.1,
        "dt_init": "random", "dt_scale": 1.0, "dt_init_floor": 1e-4, "conv_bias": True, "bias": False,
    }  # fmt: skip
    return {"d_model": options.take("d_model")} | {name: options.take(name, value) for name, value in defaults.items()}


def _mamba_mixer(options: PeerOptions) -> dict[str, Any]:
    """transformers/models/mamba/modeling_mamba.py, built from the config of a whole model."""
    options.expect("hidden_act", "silu", "silu", "swish", why="the convolution is followed by SiLU, and so is the gate")
    d_model, expand = options.take("hidden_size", 768), options.take("expand", 2)
    inner = options.take("intermediate_size", None)
    if inner is not None and inner != expand * d_model:
        raise ReferenceMismatch(
            f"{options.peer}: intermediate_size={inner}, wanted expand * hidden_size = {expand * d_model}"
        )
    options.ignore("use_mambapy", "use_associative_scan", "initializer_range", "use_cache", "layer_norm_epsilon")
    options.ignore("num_hidden_layers", "residual_in_fp32", "rescale_prenorm_residual", "model_type")
    options.ignore("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    return {
        "d_model": d_model,
        "expand": expand,
        "d_state": options.take("state_size", 16),
        "d_conv": options.take("conv_kernel", 4),
        "bias": options.take("use_bias", False),
        "conv_bias": options.take("use_conv_bias", True),
        "dt_rank": options.take("time_step_rank", "auto"),
        "dt_scale": options.take("time_step_scale", 1.0),
        "dt_min": options.take("time_step_min", 0.001),
        "dt_max": options.take("time_step_max", 0.1),
        "dt_init": options.take("time_step_init_scheme", "random"),
        "dt_init_floor": options.take("time_step_floor", 1e-4),
    }


PEERS: dict[str, Callable[[PeerOptions], dict[str, Any]]] = {
    "Mamba": _mamba,
    "MambaMixer": _mamba_mixer,
    "MambaMixer (torch path)": _mamba_mixer,
}

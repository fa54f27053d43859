"""Mamba-2 layers of other packages, as our config and weights; the weights have the same names everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sequence_mixer.errors import ReferenceMismatch, unknown_name
from sequence_mixer.peer_options import PeerOptions, config_of
from zoo_ssd.config import NORM_EPS, SsdConfig

ONLY_SILU = "the convolution is followed by SiLU"
FOREVER = (0.0, float("inf"))


def from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[SsdConfig, dict[str, Tensor]]:
    """Our config and state dict for a reference layer.

    peer: "Mamba2", "Mamba2Simple" (mamba_ssm) or "Mamba2Mixer" (transformers).
    config: its own constructor arguments; those left out have its defaults. `B`, `T` and `seq_lens`, the sizes of a
        recorded call, are not looked at.
    state_dict: its weights.
    Raises ReferenceMismatch, in words, for an unknown peer or argument and for a value that we do not reproduce.
    """
    if peer not in PEERS:
        raise ReferenceMismatch(unknown_name("reference module of ssd", peer, list(PEERS)))
    options = PeerOptions(peer, config)
    options.ignore("B", "T", "seq_lens")
    fields = PEERS[peer](options)
    options.done()
    return config_of(peer, SsdConfig, **fields), dict(state_dict)


def _mamba2(options: PeerOptions) -> dict[str, Any]:
    """mamba_ssm/modules/mamba2.py."""
    fields = _mamba_ssm(options, d_state=128, head_dim=64)
    options.expect("process_group", None, None, why="a layer is not split over devices")
    options.ignore("sequence_parallel")  # speaks of the process group
    rmsnorm, before = options.take("rmsnorm", True), options.take("norm_before_gate", False)
    return fields | {
        "d_ssm": options.take("d_ssm", None),
        "d_has_head_dim": options.take("D_has_hdim", False),
        "rmsnorm": rmsnorm,
        "norm_before_gate": bool(rmsnorm and before),  # the peer has the argument, and then no norm for it to move
    }


def _mamba2_simple(options: PeerOptions) -> dict[str, Any]:
    """mamba_ssm/modules/mamba2_simple.py: one norm over all channels, whatever the groups."""
    fields = _mamba_ssm(options, d_state=64, head_dim=128)
    options.expect("activation", "swish", "swish", "silu", why=ONLY_SILU)
    options.ignore("deterministic")
    learnt = options.take("learnable_init_states", False)
    return fields | {"norm_groups": 1, "learnable_init_states": learnt}


def _mamba_ssm(options: PeerOptions, d_state: int, head_dim: int) -> dict[str, Any]:
    """What the two classes of mamba_ssm share, with the defaults in which they differ."""
    options.ignore("chunk_size", "use_mem_eff_path", "layer_idx", "device", "dtype")
    return {
        "d_model": options.take("d_model"),
        "d_state": options.take("d_state", d_state),
        "head_dim": options.take("headdim", head_dim),
        "expand": options.take("expand", 2),
        "n_groups": options.take("ngroups", 1),
        "d_conv": options.take("d_conv", 4),
        "bias": options.take("bias", False),
        "conv_bias": options.take("conv_bias", True),
        "conv_init": options.take("conv_init", None),
        "dt_min": options.take("dt_min", 0.001),
        "dt_max": options.take("dt_max", 0.1),
        "dt_init_floor": options.take("dt_init_floor", 1e-4),
        "dt_limit": options.take("dt_limit", FOREVER),
        "a_init_range": options.take("A_init_range", (1.0, 16.0)),
        "norm_eps": NORM_EPS,
    }


def _mamba2_mixer(options: PeerOptions) -> dict[str, Any]:
    """transformers/models/mamba2/modeling_mamba2.py, built from the config of a whole model."""
    options.expect("hidden_act", "silu", "silu", "swish", why=ONLY_SILU)
    d_model, expand = options.take("hidden_size", 4096), options.take("expand", 2)
    heads, head_dim = options.take("num_heads", 128), options.take("head_dim", 64)
    if heads * head_dim != expand * d_model:
        raise ReferenceMismatch(
            f"{options.peer}: num_heads={heads} times head_dim={head_dim} is {heads * head_dim}, "
            f"wanted expand * hidden_size = {expand * d_model}"
        )
    options.ignore("chunk_size", "rms_norm", "time_step_rank", "initializer_range", "use_cache")
    options.ignore("num_hidden_layers", "layer_types", "residual_in_fp32", "rescale_prenorm_residual", "model_type")
    options.ignore("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    return {
        "d_model": d_model,
        "expand": expand,
        "head_dim": head_dim,
        "d_state": options.take("state_size", 128),
        "n_groups": options.take("n_groups", 8),
        "d_conv": options.take("conv_kernel", 4),
        "bias": options.take("use_bias", False),
        "conv_bias": options.take("use_conv_bias", True),
        "norm_eps": options.take("layer_norm_epsilon", 1e-5),
        "dt_limit": options.take("time_step_limit", FOREVER),
        "dt_min": options.take("time_step_min", 0.001),
        "dt_max": options.take("time_step_max", 0.1),
        "dt_init_floor": options.take("time_step_floor", 1e-4),
    }


PEERS: dict[str, Callable[[PeerOptions], dict[str, Any]]] = {
    "Mamba2": _mamba2,
    "Mamba2Simple": _mamba2_simple,
    "Mamba2Mixer": _mamba2_mixer,
    "Mamba2Mixer (torch path)": _mamba2_mixer,
}

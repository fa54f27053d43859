"""Mamba-2 layers of other packages, read into ours: their constructor arguments to our config, weights as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from sequence_mixer.errors import ReferenceMismatch, suggest
from zoo_ssd.config import SsdConfig

CASE_GEOMETRY = frozenset({"B", "T", "seq_lens"})  # sizes of a recorded call, no arguments of a layer


@dataclass(frozen=True)
class Peer:
    """How a reference class names and defaults its options.

    renamed: its argument -> our field. defaults: argument -> its default where ours differs; None: it has to be given.
    fixed: argument -> values under which it equals ours, its default first. chosen: our fields without an argument.
    without_effect: arguments that choose how the same numbers are computed, or concern the model around the layer.
    """

    renamed: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    chosen: Mapping[str, Any]
    without_effect: frozenset[str]


_SAME = ("d_model", "d_state", "d_conv", "conv_init", "expand", "dt_min", "dt_max", "dt_init_floor", "dt_limit", "bias",
         "conv_bias")  # fmt: skip
_MAMBA_SSM = {name: name for name in _SAME} | {
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "A_init_range": "a_init_range",
}
_EXECUTION = frozenset({"chunk_size", "use_mem_eff_path", "layer_idx", "device", "dtype"})

_MAMBA2 = Peer(
    renamed=_MAMBA_SSM
    | {"d_ssm": "d_ssm", "D_has_hdim": "d_has_head_dim", "rmsnorm": "rmsnorm", "norm_before_gate": "norm_before_gate"},
    defaults={"d_model": None},
    fixed={"process_group": (None,)},
    chosen={},
    without_effect=_EXECUTION | {"sequence_parallel"},
)
_MAMBA2_SIMPLE = Peer(
    renamed=_MAMBA_SSM | {"learnable_init_states": "learnable_init_states"},
    defaults={"d_model": None, "d_state": 64, "headdim": 128},
    fixed={"activation": ("swish", "silu")},
    chosen={"norm_groups": 1},
    without_effect=_EXECUTION | {"deterministic"},
)
_MAMBA2_MIXER = Peer(
    renamed={
        "hidden_size": "d_model",
        "state_size": "d_state",
        "head_dim": "head_dim",
        "n_groups": "n_groups",
        "expand": "expand",
        "conv_kernel": "d_conv",
        "use_bias": "bias",
        "use_conv_bias": "conv_bias",
        "layer_norm_epsilon": "norm_eps",
        "time_step_limit": "dt_limit",
        "time_step_min": "dt_min",
        "time_step_max": "dt_max",
        "time_step_floor": "dt_init_floor",
    },
    defaults={"hidden_size": 4096, "n_groups": 8},
    fixed={"hidden_act": ("silu", "swish")},
    chosen={},
    without_effect=frozenset(
        {"chunk_size", "rms_norm", "time_step_rank", "num_hidden_layers", "layer_types", "vocab_size", "pad_token_id"}
        | {"bos_token_id", "eos_token_id", "initializer_range", "residual_in_fp32", "rescale_prenorm_residual"}
        | {"use_cache", "tie_word_embeddings", "model_type"}
    ),
)

PEERS: dict[str, Peer] = {
    "Mamba2": _MAMBA2,
    "Mamba2Simple": _MAMBA2_SIMPLE,
    "Mamba2Mixer": _MAMBA2_MIXER,
    "Mamba2Mixer (torch path)": _MAMBA2_MIXER,
}


def from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[SsdConfig, dict[str, Tensor]]:
    """Our config and state dict for a reference layer.

    peer: "Mamba2", "Mamba2Simple" (mamba_ssm) or "Mamba2Mixer" (transformers).
    config: its own constructor arguments; those left out have its defaults. state_dict: its weights, named as ours.
    Raises ReferenceMismatch, in words, for an unknown peer or option and for a value that we do not reproduce.
    """
    if peer not in PEERS:
        raise ReferenceMismatch(f"ssd reads {', '.join(PEERS)}, not {peer!r}{suggest(peer, PEERS)}")
    known = PEERS[peer]
    given = {key: value for key, value in config.items() if key not in CASE_GEOMETRY}
    fields = dict(known.chosen)
    for argument, default in known.defaults.items():
        value = given.get(argument, default)
        if value is None:
            raise ReferenceMismatch(f"{peer}: the config lacks {argument!r}, which has no default")
        fields[known.renamed[argument]] = value
    if known is _MAMBA2_MIXER:
        _expect_heads_to_fill_the_width(given)
        given.pop("num_heads", None)
    for argument, value in given.items():
        if argument in known.renamed:
            fields[known.renamed[argument]] = value
        elif argument in known.fixed:
            if value not in known.fixed[argument]:
                wanted = " or ".join(map(repr, known.fixed[argument]))
                raise ReferenceMismatch(f"{peer}: {argument}={value!r} is not reproduced, only {wanted}")
        elif argument not in known.without_effect:
            options = [*known.renamed, *known.fixed, *known.without_effect]
            raise ReferenceMismatch(f"{peer}: unknown option {argument}={value!r}{suggest(argument, options)}")
    if not fields.get("rmsnorm", True):
        fields.pop("norm_before_gate", None)  # the peer has the argument, and no norm for it to move
    try:
        return SsdConfig.model_validate(fields), dict(state_dict)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
        raise ReferenceMismatch(f"{peer}: not a config of ssd: {told}") from None


def _expect_heads_to_fill_the_width(given: Mapping[str, Any]) -> None:
    """transformers states the head count beside the widths; its layer works only where they agree."""
    heads, head_dim = given.get("num_heads", 128), given.get("head_dim", 64)
    width = given.get("expand", 2) * given.get("hidden_size", 4096)
    if heads * head_dim != width:
        raise ReferenceMismatch(
            f"Mamba2Mixer: num_heads={heads} times head_dim={head_dim} is {heads * head_dim}, "
            f"wanted expand * hidden_size = {width}"
        )

"""MLP-Mixer token mixing: an MLP over the token axis, shared by all channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sequence_mixer import BackendSpec, Capabilities, Dense, LowRank, MixerDef, hookimpl
from zoo_mlp_mixer.config import MlpMixerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from sequence_mixer import SequenceMixer

KERNEL = BackendSpec("triton", devices=("cuda",), dtypes=("float32", "bfloat16", "float16"), needs=("triton",))


def capabilities_of(config: MlpMixerConfig) -> Capabilities:
    """Both sides through Ds hidden units; with triangular weights, T of them, the past alone."""
    return Capabilities(
        causal=config.causal,
        bidirectional=not config.causal,
        padding_mask=True,
        max_length=True,
        matrix_form=True,
        value_linear=False,
        structures=(Dense(),) if config.causal else (LowRank(config.hidden),),
        backends=(KERNEL, BackendSpec("chunked"), BackendSpec("reference")),
    )


def _build(config: MlpMixerConfig) -> SequenceMixer:
    """The module of a config."""
    from zoo_mlp_mixer.mixer import MlpMixer

    return MlpMixer(config, capabilities_of(config))


def _from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[MlpMixerConfig, dict[str, Tensor]]:
    """Config and weights equal to a reference module; see `zoo_mlp_mixer.from_reference.convert`."""
    from zoo_mlp_mixer.from_reference import convert

    return convert(peer, config, state_dict)


EXAMPLES: dict[str, dict[str, Any]] = {
    "default": {"d_model": 64},
    "exact_gelu": {"d_model": 64, "max_length": 128, "tokens_dim": 24, "activation": "gelu_erf"},
    "plain": {"d_model": 64, "max_length": 100, "tokens_dim": 40, "bias": False},
    "whole_block": {"d_model": 64, "max_length": 128, "pre_norm": True, "norm_eps": 1e-5, "residual": True},
    "causal": {"d_model": 64, "max_length": 150, "causal": True},
    "causal_block": {
        "d_model": 64, "max_length": 128, "tokens_dim": 128, "causal": True, "activation": "gelu_erf",
        "pre_norm": True, "residual": True, "bias": False,
    },
}  # fmt: skip


@hookimpl
def zoo_register_mixers() -> Sequence[MixerDef]:
    return [
        MixerDef(
            "mlp_mixer",
            config=MlpMixerConfig,
            build=_build,
            capabilities_of=capabilities_of,
            examples=EXAMPLES,
            source="Tolstikhin et al. 2021 (2105.01601); google-research/vision_transformer models_mixer.py; "
            "timm MixerBlock",
            maintainer="The Mixer Zoo authors",
            from_reference=_from_reference,
        )
    ]

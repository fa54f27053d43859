"""Linear attention: softmax's exp(<q, k>) replaced by <phi(q), phi(k)>, so that the past fits in one matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sequence_mixer import BackendSpec, Capabilities, LowRank, Masked, MixerDef, RowStochastic, Semiseparable, hookimpl
from sequence_mixer.definition import OneSemiseparable, Structure
from zoo_linear_attention.config import LinearAttentionConfig

if TYPE_CHECKING:
    from torch import Tensor

    from sequence_mixer import SequenceMixer

KERNEL_WIDEST = 256  # channels of a head, for the Triton kernels
POSITIVE_MAPS = ("elu_plus_one",)  # others may give a row of zeros, or weights below zero


def capabilities_of(config: LinearAttentionConfig) -> Capabilities:
    """A causal one decodes from a state; the other sees both sides through a matrix of rank P."""
    structures: list[Structure] = [LowRank(config.width)]
    if config.causal:
        structures = [Masked(OneSemiseparable(), config.width), Semiseparable(config.width)]
    if config.normalize and config.feature_map in POSITIVE_MAPS:
        structures.append(RowStochastic())
    backends = [BackendSpec("chunked"), BackendSpec("reference")]
    if config.causal and config.width <= KERNEL_WIDEST:
        kernel = BackendSpec("triton", devices=("cuda",), dtypes=("float32", "bfloat16", "float16"), needs=("triton",))
        backends.insert(0, kernel)
    return Capabilities(
        causal=config.causal,
        bidirectional=not config.causal,
        stateful=config.causal,
        varlen=True,
        padding_mask=True,
        matrix_form=True,
        structures=tuple(structures),
        backends=tuple(backends),
    )


def _build(config: LinearAttentionConfig) -> SequenceMixer:
    """The module of a config."""
    from zoo_linear_attention.mixer import LinearAttentionMixer

    return LinearAttentionMixer(config, capabilities_of(config))


def _from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[LinearAttentionConfig, dict[str, Tensor]]:
    """Config and weights equal to a reference module; see `zoo_linear_attention.from_reference.convert`."""
    from zoo_linear_attention.from_reference import convert

    return convert(peer, config, state_dict)


_SMALL = {"d_model": 64, "n_heads": 4}

EXAMPLES: dict[str, dict[str, Any]] = {
    "default": {"d_model": 64},
    "many_heads": {**_SMALL, "bias": True, "eps": 1e-4},
    "unnormalised": {**_SMALL, "normalize": False, "scale": 0.25, "feature_map": "identity"},
    "silu": {**_SMALL, "normalize": False, "feature_map": "silu", "head_dim": 10},
    "squared_relu": {"d_model": 64, "head_dim": 8, "normalize": False, "feature_map": "squared_relu", "scale": 0.1},
    "relu": {**_SMALL, "feature_map": "relu", "eps": 0.1},
    "bidirectional": {**_SMALL, "causal": False},
    "bidirectional_unnormalised": {
        **_SMALL, "causal": False, "normalize": False, "feature_map": "silu", "bias": True, "scale": 0.1,
    },
}  # fmt: skip


@hookimpl
def zoo_register_mixers() -> Sequence[MixerDef]:
    return [
        MixerDef(
            "linear_attention",
            config=LinearAttentionConfig,
            build=_build,
            capabilities_of=capabilities_of,
            examples=EXAMPLES,
            source="Katharopoulos et al. 2020 (2006.16236); idiap/fast-transformers LinearAttention",
            maintainer="The Mixer Zoo authors",
            from_reference=_from_reference,
        )
    ]

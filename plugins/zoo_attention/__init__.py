"""Softmax attention: MHA, GQA and MQA, causal or not, with rotary positions and a key/value state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sequence_mixer import BackendSpec, Capabilities, Dense, MixerDef, RowStochastic, hookimpl
from zoo_attention.config import AttentionConfig

if TYPE_CHECKING:
    from torch import Tensor

    from sequence_mixer import SequenceMixer

KERNEL_WIDEST = 256  # channels of a head, for the Triton kernels


def backends_of(config: AttentionConfig) -> tuple[BackendSpec, ...]:
    """How a config can be computed, best first."""
    kernel = BackendSpec("triton", devices=("cuda",), dtypes=("float32", "bfloat16", "float16"), needs=("triton",))
    served = (kernel,) if config.width <= KERNEL_WIDEST else ()
    return (BackendSpec("sdpa"), *served, BackendSpec("chunked"), BackendSpec("reference"))


def capabilities_of(config: AttentionConfig) -> Capabilities:
    """A causal one decodes from a state, the other sees both sides."""
    return Capabilities(
        causal=config.causal,
        bidirectional=not config.causal,
        stateful=config.causal,
        varlen=True,
        padding_mask=True,
        matrix_form=True,
        structures=(Dense(), RowStochastic()),
        backends=backends_of(config),
    )


def _build(config: AttentionConfig) -> SequenceMixer:
    """The module of a config."""
    from zoo_attention.mixer import AttentionMixer

    return AttentionMixer(config, capabilities_of(config))


def _from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[AttentionConfig, dict[str, Tensor]]:
    """Config and weights equal to a reference module; see `zoo_attention.from_reference.convert`."""
    from zoo_attention.from_reference import convert

    return convert(peer, config, state_dict)


_SMALL = {"d_model": 64, "n_heads": 4}

EXAMPLES: dict[str, dict[str, Any]] = {
    "default": {"d_model": 64},
    "multi_head": {**_SMALL, "bias": True},
    "grouped": {**_SMALL, "n_kv_heads": 2, "rope": "interleaved"},
    "multi_query": {**_SMALL, "n_kv_heads": 1, "rope": "none"},
    "narrow_heads": {"d_model": 64, "n_heads": 3, "head_dim": 10, "scale": 0.2, "rope_base": 500.0},
    "bidirectional": {**_SMALL, "causal": False},
    "bidirectional_grouped": {**_SMALL, "n_kv_heads": 2, "causal": False, "bias": True, "rope": "none"},
}


@hookimpl
def zoo_register_mixers() -> Sequence[MixerDef]:
    return [
        MixerDef(
            "attention",
            config=AttentionConfig,
            build=_build,
            capabilities_of=capabilities_of,
            examples=EXAMPLES,
            source="Vaswani et al. 2017 (1706.03762); grouped heads: Ainslie et al. 2023 (2305.13245); "
            "rotary positions: Su et al. 2021 (2104.09864)",
            maintainer="The Mixer Zoo authors",
            from_reference=_from_reference,
        )
    ]

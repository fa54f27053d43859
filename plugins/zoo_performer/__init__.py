"""Performer: softmax attention estimated without bias by positive random features, linear in the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sequence_mixer import BackendSpec, Capabilities, LowRank, MixerDef, RowStochastic, Semiseparable, hookimpl
from sequence_mixer.definition import Structure
from zoo_performer.config import PerformerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from sequence_mixer import SequenceMixer

KERNEL_WIDEST = 256  # channels of a head, for the Triton kernels


def capabilities_of(config: PerformerConfig) -> Capabilities:
    """A causal one decodes from a state; the other sees both sides through a matrix of rank M."""
    rank = config.features
    structures: list[Structure] = [Semiseparable(rank) if config.causal else LowRank(rank)]
    positive = config.feature_map != "relu" or config.added_to_features > 0
    if positive and config.eps == config.key_eps == 0:
        structures.append(RowStochastic())
    backends = [BackendSpec("chunked"), BackendSpec("reference")]
    if config.compat is None and config.width <= KERNEL_WIDEST:
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


def _build(config: PerformerConfig) -> SequenceMixer:
    """The module of a config."""
    from zoo_performer.mixer import PerformerMixer

    return PerformerMixer(config, capabilities_of(config))


def _from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[PerformerConfig, dict[str, Tensor]]:
    """Config and weights equal to a reference module; see `zoo_performer.from_reference.convert`."""
    from zoo_performer.from_reference import convert

    return convert(peer, config, state_dict)


_SMALL = {"d_model": 64, "n_heads": 4, "n_features": 20}

EXAMPLES: dict[str, dict[str, Any]] = {
    "default": {"d_model": 64, "n_features": 64},
    "grouped": {**_SMALL, "n_kv_heads": 2, "bias": True, "redraw_interval": 1, "eps": 1e-3},
    "hyperbolic": {**_SMALL, "head_dim": 10, "feature_map": "hyperbolic", "orthogonal": False, "redraw_interval": None},
    "relu": {**_SMALL, "feature_map": "relu", "feature_eps": 1e-2, "projection_norms": "sqrt", "key_eps": 1e-6},
    "bidirectional": {**_SMALL, "causal": False, "n_kv_heads": 1, "out_bias": True},
    "bidirectional_relu": {**_SMALL, "causal": False, "feature_map": "relu"},
    "jax": {**_SMALL, "causal": False, "compat": "jax", "feature_eps": 1e-4},
}


@hookimpl
def zoo_register_mixers() -> Sequence[MixerDef]:
    return [
        MixerDef(
            "performer",
            config=PerformerConfig,
            build=_build,
            capabilities_of=capabilities_of,
            examples=EXAMPLES,
            source="Choromanski et al. 2021 (2009.14794); google-research/performer, lucidrains/performer-pytorch",
            maintainer="The Mixer Zoo authors",
            from_reference=_from_reference,
        )
    ]

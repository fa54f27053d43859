"""Mamba-1: a state space whose time steps, keys and queries depend on the input, with a decay per channel and state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sequence_mixer import MixerDef, hookimpl
from zoo_mamba.config import MambaConfig, capabilities_of

if TYPE_CHECKING:
    from torch import Tensor

    from sequence_mixer import SequenceMixer

_SMALL = {"d_model": 64, "d_state": 8}

EXAMPLES: dict[str, dict[str, Any]] = {
    "default": {"d_model": 64},
    "biases": {**_SMALL, "bias": True, "conv_bias": False, "d_conv": 2, "expand": 1},
    "constant_steps": {
        **_SMALL, "dt_rank": 7, "dt_init": "constant", "dt_scale": 0.5,
        "dt_min": 0.002, "dt_max": 0.2, "dt_init_floor": 0.004, "d_conv": 1,
    },
    "one_state": {**_SMALL, "d_state": 1, "d_conv": 3},
}  # fmt: skip


def _build(config: MambaConfig) -> SequenceMixer:
    from zoo_mamba.mixer import MambaMixer

    return MambaMixer(config)


def _from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[MambaConfig, dict[str, Tensor]]:
    from zoo_mamba.from_reference import from_reference

    return from_reference(peer, config, state_dict)


@hookimpl
def zoo_register_mixers() -> list[MixerDef]:
    return [
        MixerDef(
            name="mamba",
            config=MambaConfig,
            build=_build,
            capabilities_of=capabilities_of,
            examples=EXAMPLES,
            source="Gu & Dao 2023, arXiv 2312.00752; state-spaces/mamba Mamba",
            maintainer="The Mixer Zoo authors",
            from_reference=_from_reference,
        )
    ]

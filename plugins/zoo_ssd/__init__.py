"""SSD, the layer of Mamba-2: a selective state space with one decay per head, and masked attention at the same time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sequence_mixer import MixerDef, hookimpl
from zoo_ssd.config import SsdConfig, capabilities_of

if TYPE_CHECKING:
    from torch import Tensor

    from sequence_mixer import SequenceMixer

_SMALL = {"d_model": 64, "d_state": 16, "head_dim": 16}

EXAMPLES: dict[str, dict[str, Any]] = {
    "default": _SMALL,
    "groups": {**_SMALL, "n_groups": 2, "d_conv": 2},
    "groups_one_norm": {**_SMALL, "n_groups": 4, "norm_groups": 1, "norm_eps": 1e-3, "expand": 1},
    "no_norm": {**_SMALL, "rmsnorm": False, "bias": True},
    "norm_before_gate": {**_SMALL, "norm_before_gate": True, "conv_bias": False},
    "part_mlp": {**_SMALL, "d_ssm": 64, "conv_init": 0.5, "a_init_range": (0.5, 2.0)},
    "skip_per_channel": {**_SMALL, "d_has_head_dim": True, "head_dim": 8, "d_state": 8, "d_ssm": 32},
    "learnable_state": {**_SMALL, "learnable_init_states": True},
    "limited_steps": {
        **_SMALL, "dt_limit": (0.01, 0.05), "dt_min": 0.002, "dt_max": 0.2, "dt_init_floor": 0.004, "d_conv": 1,
    },
}  # fmt: skip


def _build(config: SsdConfig) -> SequenceMixer:
    from zoo_ssd.mixer import SsdMixer

    return SsdMixer(config)


def _from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[SsdConfig, dict[str, Tensor]]:
    from zoo_ssd.from_reference import from_reference

    return from_reference(peer, config, state_dict)


@hookimpl
def zoo_register_mixers() -> list[MixerDef]:
    return [
        MixerDef(
            name="ssd",
            config=SsdConfig,
            build=_build,
            capabilities_of=capabilities_of,
            examples=EXAMPLES,
            source="Dao & Gu 2024, arXiv 2405.21060; state-spaces/mamba Mamba2",
            maintainer="The Mixer Zoo authors",
            from_reference=_from_reference,
        )
    ]

"""S4 and S4D: linear state spaces whose kernel is as long as the sequence, recurrent when decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sequence_mixer import MixerDef, hookimpl
from zoo_s4.config import S4Config, S4dConfig, StateSpaceConfig, capabilities_of

if TYPE_CHECKING:
    from torch import Tensor

    from sequence_mixer import SequenceMixer

_SMALL = {"d_model": 64, "d_state": 8}
_SHORT = {**_SMALL, "kernel_length": 64}

S4_EXAMPLES: dict[str, dict[str, Any]] = {
    "default": {**_SHORT, "d_state": 16},
    "rank_2": {
        **_SHORT, "init": "legs+lin", "rank": 2, "n_ssm": 2, "tie_dt": False, "dt_transform": "softplus",
        "dt_min": 0.01, "dt_max": 0.3, "kernel_length": 37, "channels": 2, "activation": "silu", "output": "linear",
        "bias": False, "ssm_lr_scale": 0.1,
    },
    "rank_3": {
        **_SHORT, "init": "lagt+lin+inv+inv2+quad+real+rand+legs", "rank": 3, "n_ssm": 8, "dt_min": 0.01, "dt_max": 0.2,
        "real_scale": 1.5, "imag_scale": 0.5, "b_init": "random", "p_scale": 0.5,
        "real_transform": "softplus", "activation": "none", "output": "none", "max_length": 160,
    },
    "bidirectional": {**_SHORT, "causal": False, "activation": "silu"},
    "measures": {**_SHORT, "init": "tlagt+glagt+legsd+foud", "n_ssm": 4, "dt_min": 0.01, "dt_max": 0.2},
}  # fmt: skip

S4D_EXAMPLES: dict[str, dict[str, Any]] = {
    "default": {**_SMALL, "d_state": 16},
    "many_inits": {
        **_SMALL, "init": "inv+inv2+quad+real+rand+legs+fout+lagt", "n_ssm": 8, "tie_dt": False,
        "real_random": True, "imag_random": True, "b_init": "unit-cw", "b_scale": 2.0, "normalize": True,
        "dt_transform": "softplus", "real_transform": "sigmoid", "imag_transform": "relu", "activation": "none",
        "output": "none", "max_length": 160,
    },
    "minimal": {
        **_SMALL, "init": "lin", "use_b": False, "dt_min": 0.01, "dt_max": 0.2, "bandlimit": 0.5, "channels": 2,
        "output": "linear",
    },
    "real": {**_SMALL, "init": "real", "real": True, "real_transform": "relu", "activation": "silu", "bias": False},
    "bidirectional": {
        **_SMALL, "causal": False, "init": "inv", "imag_transform": "softplus", "disc": "bilinear",
        "activation": "silu", "ssm_lr_scale": 0.1,
    },
}  # fmt: skip


def _build_s4(config: S4Config) -> SequenceMixer:
    from zoo_s4.s4 import S4Mixer

    return S4Mixer(config)


def _build_s4d(config: S4dConfig) -> SequenceMixer:
    from zoo_s4.s4d import S4dMixer

    return S4dMixer(config)


def _s4_from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[StateSpaceConfig, dict[str, Tensor]]:
    from zoo_s4.from_reference import convert_s4

    return convert_s4(peer, config, state_dict)


def _s4d_from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[StateSpaceConfig, dict[str, Tensor]]:
    from zoo_s4.from_reference import convert_s4d

    return convert_s4d(peer, config, state_dict)


@hookimpl
def zoo_register_mixers() -> Sequence[MixerDef]:
    return [
        MixerDef(
            "s4",
            config=S4Config,
            build=_build_s4,
            capabilities_of=capabilities_of,
            examples=S4_EXAMPLES,
            source="Gu, Goel & Re 2022, arXiv 2111.00396; state-spaces/s4 S4Block(mode='dplr')",
            maintainer="The Mixer Zoo authors",
            from_reference=_s4_from_reference,
        ),
        MixerDef(
            "s4d",
            config=S4dConfig,
            build=_build_s4d,
            capabilities_of=capabilities_of,
            examples=S4D_EXAMPLES,
            source="Gu et al. 2022, arXiv 2206.11893; state-spaces/s4 S4Block(mode='diag')",
            maintainer="The Mixer Zoo authors",
            from_reference=_s4d_from_reference,
        ),
    ]

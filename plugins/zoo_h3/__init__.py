"""H3: a shift SSM on the keys and a diagonal SSM on their products with the values, between multiplicative gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sequence_mixer import MixerDef, hookimpl
from zoo_h3.config import H3Config, capabilities_of

if TYPE_CHECKING:
    from torch import Tensor

    from sequence_mixer import SequenceMixer

_SMALL = {"d_model": 64, "d_state": 16}

EXAMPLES: dict[str, dict[str, Any]] = {
    "default": _SMALL,
    "heads": {**_SMALL, "head_dim": 8, "d_state": 8, "d_conv": 4, "n_ssm": 2, "init": "inv+lin"},
    "wide_heads": {**_SMALL, "head_dim": 16, "d_state": 4, "disc": "zoh", "init": "legs", "bias": False},
    "zoh": {**_SMALL, "disc": "zoh", "init": "inv", "real_transform": "softplus", "dt_min": 0.01},
    "real": {**_SMALL, "d_state": 4, "init": "real", "real_transform": "none", "d_conv": 1, "dt_max": 0.05},
    "tied": {**_SMALL, "head_dim": 4, "n_ssm": 2, "init": "quad+inv2", "real_transform": "relu", "ssm_lr_scale": 0.5},
    "limited": {
        **_SMALL, "head_dim": 2, "init": "rand", "real_transform": "sigmoid", "d_conv": 3, "max_length": 128,
    },
}  # fmt: skip


def _build(config: H3Config) -> SequenceMixer:
    from zoo_h3.mixer import H3Mixer

    return H3Mixer(config)


def _from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[H3Config, dict[str, Tensor]]:
    from zoo_h3.from_reference import from_reference

    return from_reference(peer, config, state_dict)


@hookimpl
def zoo_register_mixers() -> Sequence[MixerDef]:
    return [
        MixerDef(
            name="h3",
            config=H3Config,
            build=_build,
            capabilities_of=capabilities_of,
            examples=EXAMPLES,
            source="Fu, Dao et al. 2023, arXiv 2212.14052; HazyResearch/H3",
            maintainer="The Mixer Zoo authors",
            from_reference=_from_reference,
        )
    ]

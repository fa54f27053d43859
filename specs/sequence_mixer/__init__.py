"""The contract of a sequence mixer: what a mixer is, what it declares, and the suite that checks it.

Names are loaded on first use, so that `sequence_mixer.errors` and `sequence_mixer.shapes` stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sequence_mixer.config import AnyMixerConfig as AnyMixerConfig
    from sequence_mixer.config import MixerConfig as MixerConfig
    from sequence_mixer.definition import BackendSpec as BackendSpec
    from sequence_mixer.definition import Capabilities as Capabilities
    from sequence_mixer.definition import Dense as Dense
    from sequence_mixer.definition import LowRank as LowRank
    from sequence_mixer.definition import Masked as Masked
    from sequence_mixer.definition import MixerDef as MixerDef
    from sequence_mixer.definition import OneSemiseparable as OneSemiseparable
    from sequence_mixer.definition import RowStochastic as RowStochastic
    from sequence_mixer.definition import Semiseparable as Semiseparable
    from sequence_mixer.definition import Toeplitz as Toeplitz
    from sequence_mixer.errors import UnsupportedCapability as UnsupportedCapability
    from sequence_mixer.hookspecs import hookimpl as hookimpl
    from sequence_mixer.kv_buffer import KeyValueBuffer as KeyValueBuffer
    from sequence_mixer.mixer import Cost as Cost
    from sequence_mixer.mixer import MatrixForm as MatrixForm
    from sequence_mixer.mixer import SequenceMixer as SequenceMixer
    from sequence_mixer.mixer import State as State
    from sequence_mixer.packing import PaddingAsPacking as PaddingAsPacking

_HOME = {
    "AnyMixerConfig": "config",
    "BackendSpec": "definition",
    "Capabilities": "definition",
    "Cost": "mixer",
    "Dense": "definition",
    "KeyValueBuffer": "kv_buffer",
    "LowRank": "definition",
    "Masked": "definition",
    "MatrixForm": "mixer",
    "MixerConfig": "config",
    "MixerDef": "definition",
    "OneSemiseparable": "definition",
    "PaddingAsPacking": "packing",
    "RowStochastic": "definition",
    "Semiseparable": "definition",
    "SequenceMixer": "mixer",
    "State": "mixer",
    "Toeplitz": "definition",
    "UnsupportedCapability": "errors",
    "hookimpl": "hookspecs",
}

__all__ = [
    "AnyMixerConfig",
    "BackendSpec",
    "Capabilities",
    "Cost",
    "Dense",
    "KeyValueBuffer",
    "LowRank",
    "Masked",
    "MatrixForm",
    "MixerConfig",
    "MixerDef",
    "OneSemiseparable",
    "PaddingAsPacking",
    "RowStochastic",
    "Semiseparable",
    "SequenceMixer",
    "State",
    "Toeplitz",
    "UnsupportedCapability",
    "hookimpl",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

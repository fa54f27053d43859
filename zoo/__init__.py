"""Mixer Zoo: sequence mixers by name. One contract, one registry, one conformance suite.

Names are loaded on first use, so that `import zoo.ops.ssd` loads neither pydantic nor pluggy nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sequence_mixer.shapes import set_debug as set_debug
    from zoo.build import create as create
    from zoo.build import from_reference as from_reference
    from zoo.explanation import explain as explain
    from zoo.registry import describe as describe
    from zoo.registry import names as names

_HOME = {
    "create": "zoo.build",
    "describe": "zoo.registry",
    "explain": "zoo.explanation",
    "from_reference": "zoo.build",
    "names": "zoo.registry",
    "set_debug": "sequence_mixer.shapes",
}

__all__ = ["create", "describe", "explain", "from_reference", "names", "set_debug"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)

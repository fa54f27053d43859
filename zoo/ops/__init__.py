"""Operators of sequence mixers: one public function each, several implementations behind it.

Importing an operator loads torch only; Triton is imported by the first call that uses it.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.ops.dispatch import record_dispatch as record_dispatch
    from zoo.ops.dispatch import register_backend as register_backend
    from zoo.ops.linear_attention import linear_attention as linear_attention
    from zoo.ops.norm import gated_rms_norm as gated_rms_norm
    from zoo.ops.short_convolution import short_convolution as short_convolution
    from zoo.ops.softmax_attention import softmax_attention as softmax_attention
    from zoo.ops.ssd import ssd as ssd

_HOME = {
    "gated_rms_norm": "norm",
    "linear_attention": "linear_attention",
    "record_dispatch": "dispatch",
    "register_backend": "dispatch",
    "short_convolution": "short_convolution",
    "softmax_attention": "softmax_attention",
    "ssd": "ssd",
}

__all__ = [
    "gated_rms_norm",
    "linear_attention",
    "record_dispatch",
    "register_backend",
    "short_convolution",
    "softmax_attention",
    "ssd",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(_HOME)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


class _Operators(types.ModuleType):
    """Keeps `zoo.ops.ssd` the function: importing the submodule of the same name would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, types.ModuleType) and _HOME.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Operators

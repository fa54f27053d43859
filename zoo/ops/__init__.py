"""Operators of sequence mixers: one public function each, several implementations behind it.

Importing an operator loads torch only; Triton is imported by the first call that uses it.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.ops.cauchy import cauchy_kernel as cauchy_kernel
    from zoo.ops.dispatch import record_dispatch as record_dispatch
    from zoo.ops.dispatch import register_backend as register_backend
    from zoo.ops.favor_attention import favor_attention as favor_attention
    from zoo.ops.linear_attention import linear_attention as linear_attention
    from zoo.ops.linear_attention.step import linear_attention_step as linear_attention_step
    from zoo.ops.linformer_attention import linformer_attention as linformer_attention
    from zoo.ops.long_convolution import long_convolution as long_convolution
    from zoo.ops.lti import lti_scan as lti_scan
    from zoo.ops.lti.step import lti_scan_step as lti_scan_step
    from zoo.ops.lti_attention import lti_attention as lti_attention
    from zoo.ops.lti_attention.step import lti_attention_step as lti_attention_step
    from zoo.ops.norm import gated_rms_norm as gated_rms_norm
    from zoo.ops.random_attention import random_attention as random_attention
    from zoo.ops.selective_scan import selective_scan as selective_scan
    from zoo.ops.selective_scan.step import selective_scan_step as selective_scan_step
    from zoo.ops.short_convolution import short_convolution as short_convolution
    from zoo.ops.short_convolution.step import short_convolution_step as short_convolution_step
    from zoo.ops.softmax_attention import softmax_attention as softmax_attention
    from zoo.ops.ssd import ssd as ssd
    from zoo.ops.ssd.step import ssd_step as ssd_step
    from zoo.ops.state_space import state_space_scan as state_space_scan
    from zoo.ops.synthetic_attention import synthetic_attention as synthetic_attention
    from zoo.ops.token_mlp import token_mlp as token_mlp

_HOME = {
    "cauchy_kernel": "cauchy",
    "favor_attention": "favor_attention",
    "gated_rms_norm": "norm",
    "linear_attention": "linear_attention",
    "linear_attention_step": "linear_attention.step",
    "linformer_attention": "linformer_attention",
    "long_convolution": "long_convolution",
    "lti_attention": "lti_attention",
    "lti_attention_step": "lti_attention.step",
    "lti_scan": "lti",
    "lti_scan_step": "lti.step",
    "random_attention": "random_attention",
    "record_dispatch": "dispatch",
    "register_backend": "dispatch",
    "selective_scan": "selective_scan",
    "selective_scan_step": "selective_scan.step",
    "short_convolution": "short_convolution",
    "short_convolution_step": "short_convolution.step",
    "softmax_attention": "softmax_attention",
    "ssd": "ssd",
    "ssd_step": "ssd.step",
    "state_space_scan": "state_space",
    "synthetic_attention": "synthetic_attention",
    "token_mlp": "token_mlp",
}

__all__ = [
    "cauchy_kernel",
    "favor_attention",
    "gated_rms_norm",
    "linear_attention",
    "linear_attention_step",
    "linformer_attention",
    "long_convolution",
    "lti_attention",
    "lti_attention_step",
    "lti_scan",
    "lti_scan_step",
    "random_attention",
    "record_dispatch",
    "register_backend",
    "selective_scan",
    "selective_scan_step",
    "short_convolution",
    "short_convolution_step",
    "softmax_attention",
    "ssd",
    "ssd_step",
    "state_space_scan",
    "synthetic_attention",
    "token_mlp",
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

"""Feature maps in half precision as an operator: what PyTorch computes in some six passes over float32 copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops.custom import refuse_higher_order


@torch.library.custom_op("zoo::linear_attention_features", mutates_args=())
def mapped(x: Tensor, feature_map: str) -> Tensor:
    """phi(x), computed in float32 and rounded once to the dtype of x, [B,T,H,N] contiguous, from x [B,T,H,N]."""
    from zoo.ops.linear_attention.kernels.features import launch

    return launch(x, None, feature_map)


@mapped.register_fake
def _(x: Tensor, feature_map: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::linear_attention_features_backward", mutates_args=())
def mapped_backward(dphi: Tensor, x: Tensor, feature_map: str) -> Tensor:
    """dphi times phi'(x), contiguous, in the dtype of x."""
    from zoo.ops.linear_attention.kernels.features import launch

    return launch(x, dphi, feature_map)


@mapped_backward.register_fake
def _(dphi: Tensor, x: Tensor, feature_map: str) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.feature_map = inputs[1]


def _differentiate(ctx: Any, dphi: Tensor) -> tuple[Tensor, None]:
    return mapped_backward(dphi, *ctx.saved_tensors, ctx.feature_map), None


mapped.register_autograd(_differentiate, setup_context=_save)
for _op, _forward in ((mapped, True), (mapped_backward, False)):
    refuse_higher_order(_op, "linear_attention", has_gradient=_forward)

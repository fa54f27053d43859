"""Gates around the scan of heads of one channel, as custom operators: PyTorch reads the slices of a projection number
by number, and takes four passes over three tensors each for the gradients of two products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops.custom import refuse_higher_order


@torch.library.custom_op("zoo::gate", mutates_args=())
def gate(a: Tensor, b: Tensor) -> Tensor:
    """a b for a, b [B,T,D] of one dtype, not empty; contiguous."""
    from zoo.ops.lti_attention.kernels import gates

    return gates.product(a, b)


@gate.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape)


@torch.library.custom_op("zoo::gate_backward", mutates_args=())
def gate_backward(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients g b and g a of both factors."""
    from zoo.ops.lti_attention.kernels import gates

    return gates.product_gradients(g, a, b)


@gate_backward.register_fake
def _(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), a.new_empty(a.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    da, db = gate_backward(g, *ctx.saved_tensors)
    return da, db


gate.register_autograd(_differentiate, setup_context=_save)
refuse_higher_order(gate, "lti_attention", has_gradient=True)
refuse_higher_order(gate_backward, "lti_attention", has_gradient=False)

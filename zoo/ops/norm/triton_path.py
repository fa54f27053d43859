"""Gated RMS norm through the Triton kernels: two custom operators, their fakes, gradient and FLOP formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops.custom import flop_formula, refuse_higher_order


def gated_rms_norm_triton(
    x: Tensor, z: Tensor | None, weight: Tensor, *, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """Arguments and result of `gated_rms_norm`, with a group size; x is not empty."""
    y: Tensor = torch.ops.zoo.gated_rms_norm_fwd(x, z, weight, eps, group_size, norm_before_gate)
    return y


@torch.library.custom_op("zoo::gated_rms_norm_fwd", mutates_args=())
def gated_rms_norm_fwd(
    x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """y [...,D], contiguous, in the dtype of x."""
    from zoo.ops.kernels.devices import on_device
    from zoo.ops.norm.kernels.forward import norm_forward

    with on_device(x):
        return norm_forward(x, z, weight, eps, group_size, norm_before_gate)


@gated_rms_norm_fwd.register_fake
def _fwd_fake(
    x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::gated_rms_norm_bwd", mutates_args=())
def gated_rms_norm_bwd(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z ([0] if it did not come) and weight, contiguous, in their shapes and dtypes."""
    from zoo.ops.kernels.devices import on_device
    from zoo.ops.norm.kernels.backward import norm_backward

    with on_device(x):
        return norm_backward(dy, x, z, weight, eps, group_size, norm_before_gate)


@gated_rms_norm_bwd.register_fake
def _bwd_fake(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    return x.new_empty(x.shape), dz, weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, z, weight, *ctx.options = inputs
    ctx.save_for_backward(x, z, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, z, weight = ctx.saved_tensors
    dx, dz, dweight = torch.ops.zoo.gated_rms_norm_bwd(dy, x, z, weight, *ctx.options)
    return dx, None if z is None else dz, dweight, None, None, None


gated_rms_norm_fwd.register_autograd(_backward, setup_context=_setup_context)
refuse_higher_order(gated_rms_norm_fwd, "gated_rms_norm", has_gradient=True)
refuse_higher_order(gated_rms_norm_bwd, "gated_rms_norm", has_gradient=False)


@flop_formula([torch.ops.zoo.gated_rms_norm_fwd, torch.ops.zoo.gated_rms_norm_bwd], get_raw=True)
def _flops(*_: Any, **__: Any) -> int:
    return 0  # no matrix product

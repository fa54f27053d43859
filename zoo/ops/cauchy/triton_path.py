"""Cauchy sums through the Triton kernels: two custom operators, their fakes, gradient and FLOP formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops.custom import flop_formula, refuse_higher_order


def cauchy_triton(v: Tensor, w: Tensor, z: Tensor, q: Tensor | None) -> Tensor:
    """Arguments and result of `cauchy_kernel`; nothing is empty and the nodes need no gradient."""
    y: Tensor = torch.ops.zoo.cauchy_fwd(v, w, z, q)
    return y


@torch.library.custom_op("zoo::cauchy_fwd", mutates_args=())
def cauchy_fwd(v: Tensor, w: Tensor, z: Tensor, q: Tensor | None) -> Tensor:
    """y [D,R,K,2], contiguous, in the dtype of v."""
    from zoo.ops.cauchy.kernels.forward import cauchy_forward

    return cauchy_forward(v, w, z, q)


@cauchy_fwd.register_fake
def _fwd_fake(v: Tensor, w: Tensor, z: Tensor, q: Tensor | None) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[1], z.shape[0], 2)


@torch.library.custom_op("zoo::cauchy_bwd", mutates_args=())
def cauchy_bwd(dy: Tensor, v: Tensor, w: Tensor, z: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of v and w, contiguous, in their dtypes."""
    from zoo.ops.cauchy.kernels.backward import cauchy_backward

    return cauchy_backward(dy, v, w, z, q)


@cauchy_bwd.register_fake
def _bwd_fake(dy: Tensor, v: Tensor, w: Tensor, z: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), w.new_empty(w.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dv, dw = torch.ops.zoo.cauchy_bwd(dy, *ctx.saved_tensors)
    return dv, dw, None, None


cauchy_fwd.register_autograd(_backward, setup_context=_setup_context)
refuse_higher_order(cauchy_fwd, "cauchy_kernel", has_gradient=True)
refuse_higher_order(cauchy_bwd, "cauchy_kernel", has_gradient=False)


@flop_formula(torch.ops.zoo.cauchy_fwd)
def _fwd_flops(v: Any, w: Any, z: Any, *_: Any, **__: Any) -> int:
    return int(8 * v[0] * v[1] * v[2] * z[0])


@flop_formula(torch.ops.zoo.cauchy_bwd)
def _bwd_flops(dy: Any, v: Any, w: Any, z: Any, *_: Any, **__: Any) -> int:
    return int(16 * v[0] * v[1] * v[2] * z[0])

"""Short convolution through the Triton kernels: two custom operators, their fakes, gradient and FLOP formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops.custom import flop_formula, refuse_higher_order

UNROLLED = 8  # taps; more are looped over, without an activation


def short_convolution_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `short_convolution`, with silu for the activation; x is not empty."""
    y, final_state = torch.ops.zoo.short_convolution_fwd(x, weight, bias, initial_state, cu_seqlens, silu)
    return y, final_state


@torch.library.custom_op("zoo::short_convolution_fwd", mutates_args=())
def short_convolution_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y [B,T,D] and the final state [S,D,W-1] (S = B without cu_seqlens), contiguous, in the dtype of x."""
    from zoo.ops.kernels.devices import on_device
    from zoo.ops.short_convolution.kernels.banded_launch import banded_forward, banded_serves
    from zoo.ops.short_convolution.kernels.forward import convolution_forward
    from zoo.ops.short_convolution.kernels.looped import looped_forward

    with on_device(x):
        if banded_serves(x, weight.shape[1]):
            return banded_forward(x, weight, bias, initial_state, cu_seqlens)
        if weight.shape[1] > UNROLLED:
            return looped_forward(x, weight, bias, initial_state, cu_seqlens)
        return convolution_forward(x, weight, bias, initial_state, cu_seqlens, silu)


@short_convolution_fwd.register_fake
def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(sequences, x.shape[2], weight.shape[1] - 1)


@torch.library.custom_op("zoo::short_convolution_bwd", mutates_args=())
def short_convolution_bwd(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and initial_state in their shapes and dtypes; [0] for one that did not come.

    dfinal: None for zeros.
    """
    from zoo.ops.kernels.devices import on_device
    from zoo.ops.short_convolution.kernels.backward import convolution_backward
    from zoo.ops.short_convolution.kernels.banded_launch import banded_backward, banded_serves
    from zoo.ops.short_convolution.kernels.looped import looped_backward

    with on_device(x):
        if banded_serves(x, weight.shape[1]):
            return banded_backward(dy, dfinal, x, weight, bias, initial_state, cu_seqlens)
        if weight.shape[1] > UNROLLED:
            return looped_backward(dy, dfinal, x, weight, bias, initial_state, cu_seqlens)
        return convolution_backward(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu)


@short_convolution_bwd.register_fake
def _bwd_fake(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    dinitial = x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dinitial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, initial_state, cu_seqlens, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias, dinitial = torch.ops.zoo.short_convolution_bwd(
        dy, dfinal, x, weight, bias, initial_state, cu_seqlens, ctx.silu
    )
    return dx, dweight, None if bias is None else dbias, None if initial_state is None else dinitial, None, None


short_convolution_fwd.register_autograd(_backward, setup_context=_setup_context)
refuse_higher_order(short_convolution_fwd, "short_convolution", has_gradient=True)
refuse_higher_order(short_convolution_bwd, "short_convolution", has_gradient=False)


@flop_formula(torch.ops.zoo.short_convolution_fwd, get_raw=True)
def _fwd_flops(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight.shape[1]


@flop_formula(torch.ops.zoo.short_convolution_bwd, get_raw=True)
def _bwd_flops(dy: Tensor, dfinal: Tensor | None, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 4 * x.numel() * weight.shape[1]  # of x and of the weight

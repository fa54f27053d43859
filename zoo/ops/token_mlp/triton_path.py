"""The token MLP with fused bias and GELU: two custom operators, their fakes, gradient and FLOP formulas.

The products are plain large matrix products, which torch.bmm does best; what is left, adding the bias and the GELU
forward and backward, is one pass over memory each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.custom import flop_formula, refuse_higher_order

ALIGNED = 8  # hidden units in memory are a multiple of it with b2: tensor cores of cuBLAS want 16 bytes


def token_mlp_triton(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, tanh: bool) -> Tensor:
    """x [B,T,D], w1 [E,T], w2 [T,E], all in one dtype -> y [B,T,D]; x is not empty."""
    trains = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, w1, b1, w2, b2))
    y: Tensor = torch.ops.zoo.token_mlp_fwd(x, w1, b1, w2, b2, tanh, trains)[0]
    return y


@torch.library.custom_op("zoo::token_mlp_fwd", mutates_args=())
def token_mlp_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, tanh: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """y [B,T,D], and w1 x [B,E,D] (empty without `keep`: the backward computes it again); contiguous, like x.

    b2 is one more column of w2 that meets a row of ones: to add it to a result, bmm would copy it there before.
    """
    from zoo.ops.token_mlp.kernels.activation import bias_gelu

    (batch, _, channels), units = x.shape, w1.shape[0]
    padded = units if b2 is None else units + ALIGNED - units % ALIGNED
    hidden = x.new_empty(batch, padded, channels)
    before = x.new_empty(batch, units, channels) if keep else hidden[:, :units]
    torch.bmm(w1.expand(batch, -1, -1), x, out=before)
    bias_gelu(before, b1, hidden, tanh)
    if b2 is not None:
        w2 = F.pad(w2, (0, padded - units))
        w2[:, units] = b2
    return _times(w2, hidden), before if keep else x.new_empty(0)


@token_mlp_fwd.register_fake
def _fwd_fake(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, tanh: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], w1.shape[0], x.shape[2]) if keep else (0,))


@torch.library.custom_op("zoo::token_mlp_bwd", mutates_args=())
def token_mlp_bwd(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, before: Tensor, tanh: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1 ([0] if it did not come) and w2, contiguous, in the dtype of x."""
    from zoo.ops.token_mlp.kernels.activation import bias_gelu_backward

    before = before if before.numel() else _times(w1, x)
    gradient = _times(w2.mT, dy)
    hidden, db1 = bias_gelu_backward(gradient, before, b1, tanh)
    dw2 = torch.bmm(dy, hidden.mT).sum(0)
    del hidden
    dw1 = torch.bmm(gradient, x.mT).sum(0)
    return _times(w1.mT, gradient), dw1, x.new_empty(0) if b1 is None else db1.to(b1.dtype), dw2


@token_mlp_bwd.register_fake
def _bwd_fake(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, before: Tensor, tanh: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    db1 = x.new_empty(0) if b1 is None else b1.new_empty(b1.shape)
    return x.new_empty(x.shape), w1.new_empty(w1.shape), db1, w2.new_empty(w2.shape)


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """weight [M,N] times every x [B,N,D]: [B,M,D], contiguous."""
    return torch.bmm(weight.expand(x.shape[0], -1, -1), x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, b1, w2, b2, ctx.tanh, _ = inputs
    ctx.has_b2 = b2 is not None
    _, before = output
    ctx.mark_non_differentiable(before)
    ctx.set_materialize_grads(False)  # of `before`, zeros as large as it
    ctx.save_for_backward(x, w1, b1, w2, before)


def _backward(ctx: Any, dy: Tensor, dbefore: Tensor | None) -> tuple[Tensor | None, ...]:
    x, w1, b1, w2, before = ctx.saved_tensors
    dx, dw1, db1, dw2 = torch.ops.zoo.token_mlp_bwd(dy, x, w1, b1, w2, before, ctx.tanh)
    return dx, dw1, None if b1 is None else db1, dw2, dy.sum((0, 2)) if ctx.has_b2 else None, None, None


token_mlp_fwd.register_autograd(_backward, setup_context=_setup_context)
refuse_higher_order(token_mlp_fwd, "token_mlp", has_gradient=True)
refuse_higher_order(token_mlp_bwd, "token_mlp", has_gradient=False)


@flop_formula(torch.ops.zoo.token_mlp_fwd, get_raw=True)
def _fwd_flops(x: Tensor, w1: Tensor, *_: Any, **__: Any) -> int:
    return 4 * x.numel() * w1.shape[0]


@flop_formula(torch.ops.zoo.token_mlp_bwd, get_raw=True)
def _bwd_flops(dy: Tensor, x: Tensor, w1: Tensor, *_: Any, **__: Any) -> int:
    return 8 * x.numel() * w1.shape[0]

"""Random attention through the Triton kernels: two custom operators, their fakes, gradient and FLOP formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.kernels.devices import on_device
from zoo.ops.random_attention.cost import flops


def random_attention_triton(table: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Arguments and result of `random_attention`, without empty inputs."""
    y: Tensor = torch.ops.zoo.random_attention_fwd(table, v, causal)[0]
    return y


@torch.library.custom_op("zoo::random_attention_fwd", mutates_args=())
def random_attention_fwd(table: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """y [B,Tq,H,P] and the weights [H,Tq,Tk], both in the dtype of v."""
    from zoo.ops.random_attention.kernels.product import mix
    from zoo.ops.random_attention.kernels.weights import row_weights

    with on_device(v):
        weights = row_weights(table, v.dtype, causal)
        return mix(weights, v, causal), weights


@random_attention_fwd.register_fake
def _fwd_fake(table: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = v.shape
    return v.new_empty(batch, table.shape[1], heads, width), v.new_empty(table.shape)


@torch.library.custom_op("zoo::random_attention_bwd", mutates_args=())
def random_attention_bwd(
    dy: Tensor, v: Tensor, y: Tensor, weights: Tensor, causal: bool, of_table: bool, of_v: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the table, float32 [H,Tq,Tk], and of v [B,Tk,H,P]; an empty tensor for one not asked for."""
    from zoo.ops.random_attention.kernels.product import mix_backward_table, mix_backward_values

    dtable, dv = dy.new_empty(0, dtype=torch.float32), dy.new_empty(0)
    with on_device(dy):
        if of_table:
            dtable = mix_backward_table(weights, v, y, dy, causal)
        if of_v:
            dv = mix_backward_values(weights, dy, causal)
    return dtable, dv


@random_attention_bwd.register_fake
def _bwd_fake(
    dy: Tensor, v: Tensor, y: Tensor, weights: Tensor, causal: bool, of_table: bool, of_v: bool
) -> tuple[Tensor, Tensor]:
    dtable = weights.new_empty(weights.shape if of_table else 0, dtype=torch.float32)
    return dtable, v.new_empty(v.shape if of_v else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    table, v, ctx.causal = inputs
    y, weights = output
    ctx.table_dtype = table.dtype
    ctx.mark_non_differentiable(weights)
    ctx.save_for_backward(v, y, weights)


def _backward(ctx: Any, dy: Tensor, dweights: Tensor | None) -> tuple[Tensor | None, ...]:
    v, y, weights = ctx.saved_tensors
    of_table, of_v = ctx.needs_input_grad[:2]
    dtable, dv = torch.ops.zoo.random_attention_bwd(dy, v, y, weights, ctx.causal, of_table, of_v)
    return dtable.to(ctx.table_dtype) if of_table else None, dv if of_v else None, None


random_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
refuse_higher_order(random_attention_fwd, "random_attention", has_gradient=True)
refuse_higher_order(random_attention_bwd, "random_attention", has_gradient=False)


@flop_formula(torch.ops.zoo.random_attention_fwd)
def _fwd_flops(table: Sequence[int], v: Sequence[int], causal: bool, *_: Any, **__: Any) -> int:
    return flops(v[0], table[1], table[2], table[0], v[3], causal)


@flop_formula(torch.ops.zoo.random_attention_bwd)
def _bwd_flops(
    dy: Sequence[int],
    v: Sequence[int],
    y: Sequence[int],
    weights: Sequence[int],
    causal: bool,
    of_table: bool,
    of_v: bool,
    *_: Any,
    **__: Any,
) -> int:
    return (of_table + of_v) * flops(v[0], weights[1], weights[2], weights[0], v[3], causal)

"""Custom operators of a selective scan: forward and backward, fakes, autograd and FLOP formulas, for any arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.selective_scan.cost import backward_flops, flops

Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]
Backward = Callable[..., list[Tensor | None]]


def define(
    name: str, forward: Forward, backward: Backward, states_shape: Callable[[Tensor, Tensor], tuple[int, ...]]
) -> tuple[CustomOpDef, CustomOpDef]:
    """Register `zoo::NAME` and `zoo::NAME_backward`, and return both.

    forward: (x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus) -> y, final state, and the states
        that the backward starts from.
    backward: (dy, dfinal or None, states, and the inputs of the forward) -> gradients of the nine tensors before
        cu_seqlens in their shapes and dtypes, None for those that are absent.
    states_shape: from x and B, the shape of the states kept for the backward.
    """

    def scan(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus)

    def scan_backward(
        dy: Tensor,
        dfinal: Tensor | None,
        states: Tensor,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus)
        found = backward(dy, dfinal, states, *inputs)
        return tuple(x.new_empty(0) if each is None else each for each in found)  # type: ignore[return-value]

    def fake(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        cu_seqlens, inner = others[5], accumulation_dtype(x.dtype)
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        final = x.new_empty(sequences, x.shape[2], B.shape[3], dtype=inner)
        return x.new_empty(x.shape), final, x.new_empty(states_shape(x, B), dtype=inner)

    def fake_backward(dy: Tensor, dfinal: Tensor | None, states: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(dy.new_empty(0) if each is None else each.new_empty(each.shape) for each in inputs[:9])

    op = torch.library.custom_op(f"zoo::{name}", scan, mutates_args=())
    op_backward = torch.library.custom_op(f"zoo::{name}_backward", scan_backward, mutates_args=())
    op.register_fake(fake)
    op_backward.register_fake(fake_backward)
    _differentiate_by(op, op_backward)
    _count(name)
    return op, op_backward


def _differentiate_by(op: CustomOpDef, op_backward: CustomOpDef) -> None:
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.dt_softplus = inputs
        ctx.save_for_backward(output[2], *tensors)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    def differentiate(
        ctx: Any, dy: Tensor | None, dfinal: Tensor | None, dstates: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        states, *tensors = ctx.saved_tensors
        dy = torch.zeros_like(tensors[0]) if dy is None else dy
        found = op_backward(dy, dfinal, states, *tensors, ctx.dt_softplus)
        kept = [None if each is None else grad for each, grad in zip(tensors[:9], found, strict=True)]
        return (*kept, None, None)

    op.register_autograd(differentiate, setup_context=save)
    refuse_higher_order(op, "selective_scan", has_gradient=True)
    refuse_higher_order(op_backward, "selective_scan", has_gradient=False)


def _count(name: str) -> None:
    @flop_formula(getattr(torch.ops.zoo, name))
    def _forward_flops(x: Sequence[int], dt: Sequence[int], A: Sequence[int], *others: Any, **named: Any) -> int:
        return flops(x[0], x[1], x[2], A[1])

    @flop_formula(getattr(torch.ops.zoo, f"{name}_backward"))
    def _backward_flops(
        dy: Sequence[int], dfinal: Any, states: Any, x: Any, dt: Any, A: Sequence[int], *others: Any, **named: Any
    ) -> int:
        return backward_flops(dy[0], dy[1], dy[2], A[1])

"""Causal linear attention without decay by the walk kernel, as custom operators that compile and differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.semiseparable.cost import flops
from zoo.ops.semiseparable.triton_path import HALF, missing_widths


def walks(v: Tensor, log_decay: Tensor | None, normalize: bool) -> bool:
    """Whether the walk serves a call: half precision, no decay, more than one token.

    Normalised float16 is not served: its quotients have digits that states and outputs rounded to 11 bits do not.
    """
    dtypes = (torch.bfloat16,) if normalize else HALF
    return log_decay is None and v.dtype in dtypes and v.shape[1] > 1 and v.shape[0] > 0


def walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y [B,T,H,P] and the final state [S,H,N,P(+1)] of features q [B,T,H,N], k [B,T,G,N] and values v [B,T,G,P]."""
    N, P = q.shape[3], v.shape[3]
    more_n, more_p = missing_widths(v.dtype, N, P)
    if more_n or more_p:
        q, k, v = F.pad(q, (0, more_n)), F.pad(k, (0, more_n)), F.pad(v, (0, more_p))
        if initial_state is not None:
            parts = [F.pad(initial_state[..., :P], (0, more_p)), initial_state[..., P:]]
            initial_state = F.pad(torch.cat(parts, -1), (0, 0, 0, more_n))
    y, final, _ = walk_forward(q, k, v, initial_state, cu_seqlens, normalize, eps, scale)
    if more_n or more_p:
        y = y[..., :P]
        final = torch.cat([final[:, :, :N, :P], final[:, :, :N, P + more_p :]], -1)
    return y, final


@torch.library.custom_op("zoo::linear_attention", mutates_args=())
def walk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, final state in float32, and scale / (scale den + eps) [B T,H] in float32 for the backward (else empty)."""
    from zoo.ops.semiseparable.kernels import walk_launch

    return walk_launch.linear_forward(q, k, v, initial_state, cu_seqlens, normalize, eps, scale)


@walk_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, width = q.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty(sequences, heads, width, v.shape[3] + int(normalize), dtype=torch.float32)
    rows = v.new_empty(heads, batch * tokens if normalize else 0, dtype=torch.float32).mT
    return v.new_empty(batch, tokens, heads, v.shape[3]), final, rows


@torch.library.custom_op("zoo::linear_attention_backward", mutates_args=())
def walk_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    rows: Tensor,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and initial_state; an empty tensor if that is absent. dfinal: None for zeros."""
    from zoo.ops.semiseparable.kernels import walk_launch

    return walk_launch.linear_backward(dy, dfinal, q, k, v, initial_state, cu_seqlens, y, rows, normalize, scale)


@walk_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    rows: Tensor,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state = v.new_empty(0 if initial_state is None else initial_state.shape, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), state


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, normalize, _, scale = inputs
    y, _, rows = output
    ctx.save_for_backward(*tensors, y if normalize else rows, rows)  # y is read for the normaliser only
    ctx.options = normalize, scale
    ctx.mark_non_differentiable(rows)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dy: Tensor | None, dfinal: Tensor | None, drows: Tensor | None
) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    if dy is None:
        q, v = inputs[0], inputs[2]
        dy = v.new_zeros(*q.shape[:3], v.shape[3])
    dq, dk, dv, dinitial = walk_backward(dy, dfinal, *inputs, *ctx.options)
    return dq, dk, dv, None if inputs[3] is None else dinitial, None, None, None, None


walk_forward.register_autograd(_differentiate, setup_context=_save)
for _op, _forward in ((walk_forward, True), (walk_backward, False)):
    refuse_higher_order(_op, "linear_attention", has_gradient=_forward)


@flop_formula(torch.ops.zoo.linear_attention)
def _forward_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return flops(q[0], q[1], q[2], q[2], q[3], v[3])


@flop_formula(torch.ops.zoo.linear_attention_backward)
def _backward_flops(
    dy: Sequence[int],
    dfinal: Sequence[int] | None,
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    *args: Any,
    **kw: Any,
) -> int:
    """Three walks: dv is one over keys of N channels, dq and dk are two over keys of P."""
    sizes = q[0], q[1], q[2], q[2]
    return flops(*sizes, q[3], v[3]) + 2 * flops(*sizes, v[3], q[3])

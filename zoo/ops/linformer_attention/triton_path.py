"""Linformer attention through the Triton kernels: two custom operators, their fakes, gradient and FLOP formulas.

The kernels do what has something to fuse or to split: the projections, whose sums run over the whole length, and the
attention. The gradients of k, v, E and F are plain large matrix products and left to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops.alignment import RealFirst, real_spans
from zoo.ops.custom import flop_formula, refuse_higher_order


def linformer_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor, *, padding_mask: Tensor | None
) -> Tensor:
    """Arguments and result of `linformer_attention`, without empty inputs; E and F are [...,R,T] in the dtype of q."""
    y: Tensor = torch.ops.zoo.linformer_attention_fwd(q, k, v, E, F, padding_mask)[0]
    return y


@torch.library.custom_op("zoo::linformer_attention_fwd", mutates_args=())
def linformer_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B,T,H,P], and E k and F v, each [B,R,G,P]; contiguous, in the dtype of q."""
    from zoo.ops.linformer_attention.kernels.forward import attend
    from zoo.ops.linformer_attention.kernels.project import project

    spans = None if padding_mask is None else real_spans(padding_mask)
    keys, values = project(E, k, spans), project(F, v, spans)
    return attend(q, keys, values, spans), keys, values


@linformer_attention_fwd.register_fake
def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    projected = (q.shape[0], E.shape[-2], *k.shape[2:])
    return q.new_empty(q.shape), q.new_empty(projected), q.new_empty(projected)


@torch.library.custom_op("zoo::linformer_attention_bwd", mutates_args=())
def linformer_attention_bwd(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    E: Tensor,
    F: Tensor,
    keys: Tensor,
    values: Tensor,
    padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, E and F, contiguous, in the dtype of q."""
    from zoo.ops.linformer_attention.kernels.backward import attend_backward

    spans = None if padding_mask is None else real_spans(padding_mask)
    dq, dkeys, dvalues = attend_backward(dy, q, keys, values, spans)
    aligned = None if padding_mask is None else RealFirst(padding_mask)
    if aligned is not None:
        k, v = aligned.turn(k), aligned.turn(v)
    dk, dv = spread(E, dkeys), spread(F, dvalues)
    if aligned is not None:
        dk, dv = aligned.turn_back(dk), aligned.turn_back(dv)
    return dq, dk, dv, outer(dkeys, k, E.dim()), outer(dvalues, v, F.dim())


@linformer_attention_bwd.register_fake
def _bwd_fake(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    E: Tensor,
    F: Tensor,
    keys: Tensor,
    values: Tensor,
    padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        E.new_empty(E.shape),
        F.new_empty(F.shape),
    )


def spread(matrix: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of what was projected: matrix [R,T] or [G,R,T], gradient [B,R,G,P] -> [B,T,G,P], contiguous."""
    if matrix.dim() == 3:
        return torch.einsum("grt,brgp->btgp", matrix, gradient).contiguous()
    every = matrix.mT.expand(gradient.shape[0], -1, -1)
    spread_out: Tensor = torch.bmm(every, gradient.flatten(2)).unflatten(2, gradient.shape[2:])
    return spread_out


def outer(gradient: Tensor, x: Tensor, axes: int) -> Tensor:
    """Gradient of the matrix: gradient [B,R,G,P], x [B,T,G,P] -> [R,T] (axes 2) or [G,R,T] (axes 3), contiguous."""
    if axes == 3:
        return torch.einsum("brgp,btgp->grt", gradient, x).contiguous()
    return torch.bmm(gradient.flatten(2), x.flatten(2).mT).sum(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, E, F, padding_mask = inputs
    _, keys, values = output
    ctx.mark_non_differentiable(keys, values)
    ctx.save_for_backward(q, k, v, E, F, keys, values, padding_mask)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.zoo.linformer_attention_bwd(dy, *ctx.saved_tensors)
    return *gradients, None


linformer_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
refuse_higher_order(linformer_attention_fwd, "linformer_attention", has_gradient=True)
refuse_higher_order(linformer_attention_bwd, "linformer_attention", has_gradient=False)


@flop_formula(torch.ops.zoo.linformer_attention_fwd, get_raw=True)
def _fwd_flops(q: Tensor, k: Tensor, v: Tensor, E: Tensor, *_: Any, **__: Any) -> int:
    return 4 * E.shape[-2] * (k.numel() + q.numel())


@flop_formula(torch.ops.zoo.linformer_attention_bwd, get_raw=True)
def _bwd_flops(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, E: Tensor, *_: Any, **__: Any) -> int:
    """Four products for the projections; scores again and four more for the attention."""
    return E.shape[-2] * (8 * k.numel() + 10 * q.numel())

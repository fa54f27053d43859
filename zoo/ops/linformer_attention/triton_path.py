"""Linformer attention through the Triton kernels: two custom operators, their fakes, gradient and FLOP formulas.

The kernels do what has something to fuse or to split: the attention, and projections whose sums run over a part of the
length. One projection for all heads and rows, and the gradients of k, v, E and F, are large products left to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from zoo.ops.alignment import RealFirst, real_spans
from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.linformer_attention import chunked
from zoo.ops.linformer_attention.kernels.tiles import holds


def linformer_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor, *, padding_mask: Tensor | None
) -> Tensor:
    """Arguments and result of `linformer_attention`, without empty inputs; E and F are [...,R,T] in the dtype of q."""
    trains = torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v, E, F))
    y: Tensor = torch.ops.zoo.linformer_attention_fwd(q, k, v, E, F, padding_mask, trains)[0]
    return y


@torch.library.custom_op("zoo::linformer_attention_fwd", mutates_args=())
def linformer_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor, padding_mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [B,T,H,P], and E k and F v, each [B,R,G,P]; contiguous, in the dtype of q. And float32 [B,H,T] for a backward
    that uses it, under `keep`; else empty."""
    from zoo.ops.linformer_attention.kernels.forward import attend
    from zoo.ops.linformer_attention.kernels.held import attend_held

    spans = None if padding_mask is None else real_spans(padding_mask)
    keys, values = shortened(E, k, spans), shortened(F, v, spans)
    if not keep and spans is None and q.dtype != torch.float32:  # cuDNN's forward is a tenth faster than ours
        turned, turned_keys, turned_values = (part.transpose(1, 2) for part in (q, keys, values))
        grouped = q.shape[2] != k.shape[2]
        y = scaled_dot_product_attention(turned, turned_keys, turned_values, enable_gqa=grouped)
        y = y.transpose(1, 2).contiguous()
        return y, keys, values, q.new_empty(0, dtype=torch.float32)
    if holds(E.shape[-2], q.shape[3], q.element_size()):
        y, lse = attend_held(q, keys, values, spans, keep)
        return y, keys, values, lse
    return attend(q, keys, values, spans), keys, values, q.new_empty(0, dtype=torch.float32)


@linformer_attention_fwd.register_fake
def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor, padding_mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    projected = (q.shape[0], E.shape[-2], *k.shape[2:])
    kept = keep and holds(E.shape[-2], q.shape[3], q.element_size())
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]) if kept else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty(projected), q.new_empty(projected), lse


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
    y: Tensor | None,
    lse: Tensor,
    padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, E and F, contiguous, in the dtype of q. y: needed if lse is not empty."""
    from zoo.ops.linformer_attention.kernels.backward import attend_backward
    from zoo.ops.linformer_attention.kernels.held import attend_held_backward

    spans = None if padding_mask is None else real_spans(padding_mask)
    if y is not None and lse.numel():
        dq, dkeys, dvalues = attend_held_backward(dy, q, y, keys, values, lse, spans)
    else:
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
    y: Tensor | None,
    lse: Tensor,
    padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        E.new_empty(E.shape),
        F.new_empty(F.shape),
    )


def shortened(matrix: Tensor, x: Tensor, spans: Tensor | None) -> Tensor:
    """matrix [R,T] or [G,R,T], x [B,T,G,P] -> [B,R,G,P], contiguous. spans: as in `kernels.project`.

    One matrix for all heads and rows is one large product; the kernel is for rows that start and end elsewhere, and for
    matrices of each head, for which torch would transpose x in memory.
    """
    if spans is None and matrix.dim() == 2:
        return chunked.project(matrix, x)
    from zoo.ops.linformer_attention.kernels.project import project

    return project(matrix, x, spans)


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
    q, k, v, E, F, padding_mask, _ = inputs
    y, keys, values, lse = output
    ctx.mark_non_differentiable(keys, values, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, E, F, keys, values, y if lse.numel() else None, lse, padding_mask)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.zoo.linformer_attention_bwd(dy, *ctx.saved_tensors)
    return *gradients, None, None


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

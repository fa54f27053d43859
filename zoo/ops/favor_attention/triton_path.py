"""FAVOR+ attention by Triton kernels, as custom operators that compile and differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.favor_attention.chunked import favor_attention_chunked
from zoo.ops.favor_attention.features import half_square
from zoo.ops.favor_attention.kernel_cost import backward_flops, forward_flops

WIDEST = 256


def refuses(*, compat: str | None, trained_projection: bool, N: int, P: int) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    if compat is not None:
        return f"has no kernel for compat={compat!r}"
    if trained_projection:
        return "has no gradient for the projection, and it requires one"
    if max(N, P) > WIDEST:
        return f"takes heads of at most {WIDEST} channels, wanted N={N}, P={P}"
    return None


def favor_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    features: str,
    causal: bool,
    eps: float,
    feature_eps: float,
    compat: str | None,
    padding_mask: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `favor_attention`; one causal token without packing is a recurrence that PyTorch does as fast."""
    if causal and v.shape[1] == 1 and cu_seqlens is None:
        return favor_attention_chunked(
            q, k, v, projection, features, causal, eps, feature_eps, compat, padding_mask, initial_state, cu_seqlens
        )
    relu = features == "relu"
    rows = torch.cat([projection, -projection]) if features == "hyperbolic" else projection
    q_starts, q_ends = spans_of(q, padding_mask if q.shape[1] == k.shape[1] else None, cu_seqlens)
    k_starts, k_ends = spans_of(k, padding_mask, cu_seqlens)
    y, log_total, final_state = favor_attention_forward(
        q, k, v, rows, initial_state, q_starts, q_ends, k_starts, k_ends,
        cu_seqlens is not None, relu, causal, feature_eps,
    )  # fmt: skip
    if eps:
        log_total = log_total.unsqueeze(-1)
        if not relu:  # the kernels leave out what cancels: |q'|^2 / 2, and the factor 1 / M
            log_total = log_total - half_square(q) - torch.log(log_total.new_tensor(rows.shape[0]))
        y = (y.float() * torch.sigmoid(log_total - torch.log(log_total.new_tensor(eps)))).to(v.dtype)
    return y, final_state


def spans_of(part: Tensor, padding_mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """First token and end of every sequence of `part` [B,T,...], int64 [S], counted over the flattened batch."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(torch.int64)
        return bounds[:-1].clone(), bounds[1:].clone()
    starts = torch.arange(part.shape[0], device=part.device) * part.shape[1]
    if padding_mask is None:
        return starts, starts + part.shape[1]
    starts = starts + padding_mask.to(torch.int32).argmax(1)
    return starts, starts + padding_mask.sum(1)


@torch.library.custom_op("zoo::favor_attention", mutates_args=())
def favor_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    initial_state: Tensor | None,
    q_starts: Tensor,
    q_ends: Tensor,
    k_starts: Tensor,
    k_ends: Tensor,
    packed: bool,
    relu: bool,
    causal: bool,
    feature_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B,T,H,P], logarithms of its sums of weights [B,T,H] float32, final state [S,H,M,P+2] float32.

    projection: [M,N], w and -w for hyperbolic features. Tokens outside all spans have undefined y and gradients.
    """
    from zoo.ops.favor_attention.kernels import launch

    spans = (q_starts, q_ends, k_starts, k_ends)
    return launch.forward(q, k, v, projection, initial_state, spans, packed, relu, causal, feature_eps)


@favor_attention_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, initial_state: Tensor | None, q_starts: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    state = (q_starts.shape[0], heads, projection.shape[0], v.shape[3] + 2)
    return (
        v.new_empty(batch, tokens, heads, v.shape[3]),
        v.new_empty(batch, tokens, heads, dtype=torch.float32),
        v.new_empty(state, dtype=torch.float32),
    )


@torch.library.custom_op("zoo::favor_attention_backward", mutates_args=())
def favor_attention_backward(
    dy: Tensor,
    dlog_total: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    initial_state: Tensor | None,
    y: Tensor,
    log_total: Tensor,
    final_state: Tensor,
    q_starts: Tensor,
    q_ends: Tensor,
    k_starts: Tensor,
    k_ends: Tensor,
    packed: bool,
    relu: bool,
    causal: bool,
    feature_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and initial_state (empty if there is none)."""
    from zoo.ops.favor_attention.kernels import launch

    spans = (q_starts, q_ends, k_starts, k_ends)
    return launch.backward(
        dy, dlog_total, dfinal, q, k, v, projection, initial_state, y, log_total, final_state,
        spans, packed, relu, causal, feature_eps,
    )  # fmt: skip


@favor_attention_backward.register_fake
def _backward_fake(
    dy: Tensor, dlog_total: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, projection: Tensor,
    initial_state: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    state = v.new_empty(0 if initial_state is None else dfinal.shape, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), state


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.options = inputs[9:]


def _differentiate(ctx: Any, dy: Tensor, dlog_total: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, projection, initial_state, *spans, y, log_total, final_state = ctx.saved_tensors
    dq, dk, dv, dinitial = favor_attention_backward(
        dy, dlog_total, dfinal, q, k, v, projection, initial_state, y, log_total, final_state, *spans, *ctx.options
    )
    return (dq, dk, dv, None, None if initial_state is None else dinitial, *[None] * 8)


favor_attention_forward.register_autograd(_differentiate, setup_context=_save)
for _op, _forward in ((favor_attention_forward, True), (favor_attention_backward, False)):
    refuse_higher_order(_op, "favor_attention", has_gradient=_forward)


@flop_formula(torch.ops.zoo.favor_attention)
def _forward_flops(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], projection: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return forward_flops(q, k, v[3], projection[0], causal=args[7])


@flop_formula(torch.ops.zoo.favor_attention_backward)
def _backward_flops(
    dy: Sequence[int], dlog: Sequence[int], dfinal: Sequence[int], q: Sequence[int], k: Sequence[int],
    v: Sequence[int], projection: Sequence[int], *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return backward_flops(q, k, v[3], projection[0], causal=args[10])

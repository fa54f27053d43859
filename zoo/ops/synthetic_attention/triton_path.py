"""Synthetic attention through the Triton kernels: two custom operators, their fakes, gradient and FLOP formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.kernels.devices import on_device
from zoo.ops.softmax_attention.triton_path import batch_spans, packed_spans
from zoo.ops.synthetic_attention.parts import Parts


def synthetic_attention_triton(
    parts: Parts,
    v: Tensor,
    *,
    queries: int,
    past: Tensor | None,
    causal: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """Arguments and result of `synthetic_attention`, without empty inputs.

    Sequences are described by spans, int64 [S,5]: first query, number of queries, first key, number of keys, and the
    position of the first query.
    """
    packed = cu_seqlens is not None
    if cu_seqlens is not None and cu_seqlens_k is not None:
        spans = packed_spans(cu_seqlens, cu_seqlens_k)
    else:
        spans = batch_spans(v.shape[0], queries, v.shape[1], None, v.device)
        if past is not None:
            spans = torch.cat([spans[:, :4], past.to(torch.int64).unsqueeze(1)], 1)
    y: Tensor = torch.ops.zoo.synthetic_attention_fwd(v, *parts, spans, queries, causal, packed)[0]
    return y


@torch.library.custom_op("zoo::synthetic_attention_fwd", mutates_args=())
def synthetic_attention_fwd(
    v: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    table: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    spans: Tensor,
    queries: int,
    causal: bool,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """y [B,Tq,H,P] in the dtype of v, and the log-sum-exp of the logits, float32 [B,H,Tq] (+inf: no key)."""
    from zoo.ops.synthetic_attention.kernels.forward import synthetic_forward

    with on_device(v):
        return synthetic_forward(v, q, k, table, left, right, spans, queries, causal, packed)


@synthetic_attention_fwd.register_fake
def _fwd_fake(
    v: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    table: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    spans: Tensor,
    queries: int,
    causal: bool,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = v.shape
    return v.new_empty(batch, queries, heads, width), v.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.custom_op("zoo::synthetic_attention_bwd", mutates_args=())
def synthetic_attention_bwd(
    dy: Tensor,
    v: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    table: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    y: Tensor,
    lse: Tensor,
    spans: Tensor,
    causal: bool,
    packed: bool,
    of_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v, q, k, the table (float32), left and right, contiguous; an empty tensor for each that is absent.

    of_table: whether that of the table is asked for.
    """
    from zoo.ops.synthetic_attention.kernels.backward import synthetic_backward

    with on_device(v):
        return synthetic_backward(dy, v, q, k, table, left, right, y, lse, spans, causal, packed, of_table)


@synthetic_attention_bwd.register_fake
def _bwd_fake(
    dy: Tensor,
    v: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    table: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    y: Tensor,
    lse: Tensor,
    spans: Tensor,
    causal: bool,
    packed: bool,
    of_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dv, dq, dk, dleft, dright = (v.new_empty(0 if part is None else part.shape) for part in (v, q, k, left, right))
    dtable = v.new_empty(table.shape if of_table and table is not None else 0, dtype=torch.float32)
    return dv, dq, dk, dtable, dleft, dright


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, spans, _, causal, packed = inputs
    y, lse = output
    ctx.options = (causal, packed)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, y, lse, spans)


def _backward(ctx: Any, dy: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, y, lse, spans = ctx.saved_tensors
    table, of_table = tensors[3], bool(ctx.needs_input_grad[3])
    gradients = torch.ops.zoo.synthetic_attention_bwd(dy, *tensors, y, lse, spans, *ctx.options, of_table)
    found = [None if tensor is None else gradient for tensor, gradient in zip(tensors, gradients, strict=True)]
    found[3] = gradients[3].to(table.dtype) if of_table else None
    return (*found, None, None, None, None)


synthetic_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
refuse_higher_order(synthetic_attention_fwd, "synthetic_attention", has_gradient=True)
refuse_higher_order(synthetic_attention_bwd, "synthetic_attention", has_gradient=False)


def _pairs(v: Tensor, queries: int, spans: Tensor, packed: bool) -> int:
    """Query-key pairs of all heads: full matrices, of each sequence on its own if its length can be looked at."""
    if packed and not isinstance(spans, FakeTensor) and spans.device.type != "meta":
        return v.shape[2] * int((spans[:, 1] * spans[:, 3]).sum())
    return v.shape[0] * v.shape[2] * queries * v.shape[1]


@flop_formula(torch.ops.zoo.synthetic_attention_fwd, get_raw=True)
def _fwd_flops(
    v: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    table: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    spans: Tensor,
    queries: int,
    causal: bool,
    packed: bool,
    **_: Any,
) -> int:
    return 2 * _pairs(v, queries, spans, packed) * ((0 if q is None else q.shape[3]) + v.shape[3])


@flop_formula(torch.ops.zoo.synthetic_attention_bwd, get_raw=True)
def _bwd_flops(
    dy: Tensor,
    v: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    table: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    y: Tensor,
    lse: Tensor,
    spans: Tensor,
    causal: bool,
    packed: bool,
    of_table: bool,
    **_: Any,
) -> int:
    return 2 * _pairs(v, dy.shape[1], spans, packed) * (3 * (0 if q is None else q.shape[3]) + 2 * v.shape[3])

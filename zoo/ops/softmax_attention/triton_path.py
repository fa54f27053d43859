"""Softmax attention through the Triton kernels: two custom operators, their fakes, gradient and FLOP formulas.

Padded batches and packed rows are described alike, by `spans`, int64 [S,5]: first query, number of queries, first
key, number of keys, and the offset such that local query i sees local key j if j <= i + offset.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.kernels.devices import on_device


def softmax_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    bias: None,
    padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """Arguments and result of `softmax_attention`, without bias and empty inputs."""
    packed, padded = cu_seqlens is not None, padding_mask is not None
    if cu_seqlens is not None and cu_seqlens_k is not None:
        spans = packed_spans(cu_seqlens, cu_seqlens_k)
    else:
        spans = batch_spans(q.shape[0], q.shape[1], k.shape[1], padding_mask, q.device)
    y: Tensor = torch.ops.zoo.softmax_attention_fwd(q, k, v, spans, scale, causal, packed, padded)[0]
    return y


def packed_spans(cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """Spans int64 [S,5] of packed sequences; causality is aligned at the end of each."""
    q_ends, k_ends = cu_seqlens.to(torch.int64), cu_seqlens_k.to(torch.int64)
    q_lengths, k_lengths = q_ends[1:] - q_ends[:-1], k_ends[1:] - k_ends[:-1]
    return torch.stack([q_ends[:-1], q_lengths, k_ends[:-1], k_lengths, k_lengths - q_lengths], 1)


def batch_spans(batch: int, queries: int, keys: int, padding_mask: Tensor | None, device: torch.device) -> Tensor:
    """Spans int64 [B,5] of the rows of a batch; padding_mask bool [B,Tk] or None."""
    if padding_mask is None:
        row = torch.arange(batch, device=device) * 0
        return torch.stack([row, row + queries, row, row + keys, row + (keys - queries)], 1)
    first, length = padding_mask.to(torch.int32).argmax(1), padding_mask.sum(1)
    if queries == keys:
        return torch.stack([first, length, first, length, first * 0], 1)
    return torch.stack([first * 0, first * 0 + queries, first, length, keys - queries - first], 1)


@torch.library.custom_op("zoo::softmax_attention_fwd", mutates_args=())
def softmax_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scale: float, causal: bool, packed: bool, padded: bool
) -> tuple[Tensor, Tensor]:
    """y [B,Tq,H,Pv] in the dtype of q, and the log-sum-exp of the logits, float32 [B,H,Tq] (+inf: no key).

    The logarithm is natural for float32 and to base 2 for half precision.
    """
    from zoo.ops.softmax_attention.kernels.forward import attention_forward

    with on_device(q):
        return attention_forward(q, k, v, spans, scale, causal, packed, padded)


@softmax_attention_fwd.register_fake
def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scale: float, causal: bool, packed: bool, padded: bool
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(batch, queries, heads, v.shape[3]), q.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.custom_op("zoo::softmax_attention_bwd", mutates_args=())
def softmax_attention_bwd(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    spans: Tensor,
    scale: float,
    causal: bool,
    packed: bool,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [B,Tq,H,P], k [B,Tk,G,P] and v [B,Tk,G,Pv], contiguous, in the dtype of q."""
    from zoo.ops.softmax_attention.kernels.backward import attention_backward

    with on_device(q):
        return attention_backward(dy, q, k, v, y, lse, spans, scale, causal, packed, padded)


@softmax_attention_bwd.register_fake
def _bwd_fake(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    spans: Tensor,
    scale: float,
    causal: bool,
    packed: bool,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, spans, *ctx.options = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, y, lse, spans)


def _backward(ctx: Any, dy: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, y, lse, spans = ctx.saved_tensors
    dq, dk, dv = torch.ops.zoo.softmax_attention_bwd(dy, q, k, v, y, lse, spans, *ctx.options)
    return dq, dk, dv, None, None, None, None, None


softmax_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
refuse_higher_order(softmax_attention_fwd, "softmax_attention", has_gradient=True)
refuse_higher_order(softmax_attention_bwd, "softmax_attention", has_gradient=False)


def _pairs(q: Tensor, k: Tensor, spans: Tensor, packed: bool) -> int:
    """Query-key pairs of all heads: full matrices, of each sequence on its own if its length can be looked at."""
    if packed and not isinstance(spans, FakeTensor) and spans.device.type != "meta":
        return q.shape[2] * int((spans[:, 1] * spans[:, 3]).sum())
    return q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]


@flop_formula(torch.ops.zoo.softmax_attention_fwd, get_raw=True)
def _fwd_flops(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scale: float, causal: bool, packed: bool, *_: Any, **__: Any
) -> int:
    return 2 * _pairs(q, k, spans, packed) * (q.shape[3] + v.shape[3])


@flop_formula(torch.ops.zoo.softmax_attention_bwd, get_raw=True)
def _bwd_flops(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    spans: Tensor,
    scale: float,
    causal: bool,
    packed: bool,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * _pairs(q, k, spans, packed) * (3 * q.shape[3] + 2 * v.shape[3])

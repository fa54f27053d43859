"""LTI attention by Triton kernels, as custom operators that compile and differentiate.

The kernels know powers of the modes as tables only; these are made in PyTorch, where autograd takes their gradients on
to the modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.lti.triton_path import triton_refuses as scan_refuses
from zoo.ops.lti_attention.chunked import empty_result
from zoo.ops.lti_attention.cost import backward_flops, flops, kernel_chunk
from zoo.ops.lti_attention.factors import power_of
from zoo.ops.lti_attention.one_token import one_token
from zoo.ops.lti_attention.scalar import gated_scan

KERNEL_DTYPES = ("float32", "bfloat16", "float16")
WIDEST = 128  # channels of a head that one tile holds


def refuses(*, P: int, M: int, **other: object) -> str | None:
    """Why the kernels cannot serve heads of P channels and M modes, or None."""
    if P > WIDEST:
        return f"takes heads of at most {WIDEST} channels, wanted P={P}"
    return scan_refuses(modes=M) if P == 1 else None


def lti_attention_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    c: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `lti_attention`; one token without packing is served by the recurrence itself.

    Heads of one channel go through the kernels of `lti_scan`.
    """
    if v.shape[1] == 1 and cu_seqlens is None:
        y, final = one_token(q, k, v, log_a, c, D, initial_state)
        return y.to(v.dtype), final
    if v.numel() == 0:
        return empty_result(v, log_a, initial_state, cu_seqlens)
    if v.shape[3] == 1:
        return gated_scan(q, k, v, log_a, c, D, initial_state, cu_seqlens, "triton")
    taps, powers, read = tables(log_a, c, D, kernel_chunk(log_a.shape[1], v.shape[3], v.shape[1]))
    y, final = lti_attention_forward(q, k, v, taps, powers, read, initial_state, cu_seqlens)
    return y, final


def tables(log_a: Tensor, c: Tensor, D: Tensor | None, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Taps with the skip [H,K], powers e^{l log_a} [H,2,M,K+1] and weights of the read [H,2,M,K], float32.

    The read of the state before a chunk is y_i = sum_n read_re S_re + read_im S_im, 2 Re(c e^{(i+1) log_a} S).
    """
    lags = torch.arange(chunk + 1, device=log_a.device, dtype=torch.float64)[:, None, None]
    re, im = power_of(log_a, lags).movedim(0, 2).unbind(-1)  # [H,M,K+1]
    c_re, c_im = c.double().unsqueeze(2).unbind(-1)
    seen_re, seen_im = 2 * (c_re * re - c_im * im), -2 * (c_re * im + c_im * re)
    taps = seen_re[..., :-1].sum(1)
    if D is not None:
        taps = torch.cat([taps[:, :1] + D.double().unsqueeze(1), taps[:, 1:]], 1)
    read = torch.stack([seen_re[..., 1:], seen_im[..., 1:]], 1)
    return taps.float(), torch.stack([re, im], 1).float(), read.float()


@torch.library.custom_op("zoo::lti_attention", mutates_args=())
def lti_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    powers: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B,T,H,P] in the dtype of v, final state [S,H,M,2,P,P] in float32; tables as `tables` makes them."""
    from zoo.ops.lti_attention.kernels import launch

    return launch.forward(q, k, v, taps, powers, read, initial_state, cu_seqlens)


@lti_attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    powers: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = v.new_empty(sequences, v.shape[2], read.shape[2], 2, v.shape[3], v.shape[3], dtype=torch.float32)
    return v.new_empty(v.shape), state


@torch.library.custom_op("zoo::lti_attention_backward", mutates_args=())
def lti_attention_backward(
    dy: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    powers: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, taps, powers, read and initial_state; an empty tensor if the last is absent."""
    from zoo.ops.lti_attention.kernels import launch

    return launch.backward(dy, dfinal, q, k, v, taps, powers, read, initial_state, cu_seqlens)


@lti_attention_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    powers: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    state = dfinal.new_empty(0 if initial_state is None else dfinal.shape)
    whole = [part.new_empty(part.shape) for part in (q, k, v, taps, powers, read)]
    return whole[0], whole[1], whole[2], whole[3], whole[4], whole[5], state


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    gradients = lti_attention_backward(dy, dfinal, *inputs)
    return (*(None if part is None else grad for part, grad in zip(inputs[:7], gradients, strict=True)), None)


lti_attention_forward.register_autograd(_differentiate, setup_context=_save)
for _op, _forward in ((lti_attention_forward, True), (lti_attention_backward, False)):
    refuse_higher_order(_op, "lti_attention", has_gradient=_forward)


@flop_formula(torch.ops.zoo.lti_attention)
def _forward_flops(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], taps: Sequence[int], powers: Sequence[int], *_: Any, **__: Any
) -> int:
    return flops(v[0], v[1], v[2], v[3], powers[2], chunk=taps[1], narrow=0)


@flop_formula(torch.ops.zoo.lti_attention_backward)
def _backward_flops(
    dy: Sequence[int],
    dfinal: Sequence[int],
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    taps: Sequence[int],
    powers: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    return backward_flops(v[0], v[1], v[2], v[3], powers[2], chunk=taps[1])

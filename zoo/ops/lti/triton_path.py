"""The diagonal scan by Triton kernels, as custom operators that compile and differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.lti.call import Scan
from zoo.ops.lti.cost import flops
from zoo.ops.lti.one_token import scan_one_token

KERNEL_DTYPES = ("float32", "bfloat16", "float16")
MOST_MODES = 128  # of which a program holds the states of 16 rows in registers


def triton_refuses(*, modes: int, **other: object) -> str | None:
    """Why the kernels cannot serve this many modes, or None."""
    if modes > MOST_MODES:
        return f"keeps at most {MOST_MODES} modes of a channel, log_a has {modes}"
    return None


def scan_triton(x: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
    """x [B,T,D] -> y [B,T,D], final state [S,D,M,2]."""
    if x.numel() == 0:
        return scan.untouched(x)
    if x.shape[1] == 1 and scan.cu_seqlens is None:
        return scan_one_token(x, scan)
    y, final = lti_scan_forward(
        x, scan.log_a, scan.c, scan.D, scan.c_reverse, scan.initial_state, scan.cu_seqlens, scan.reverse_lag
    )
    return y, final


@torch.library.custom_op("zoo::lti_scan", mutates_args=())
def lti_scan_forward(
    x: Tensor,
    log_a: Tensor,
    c: Tensor,
    skip: Tensor | None,
    c_reverse: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse_lag: int,
) -> tuple[Tensor, Tensor]:
    """y [B,T,D] in the dtype of x, rounded once, and the final state [S,D,M,2] in float32."""
    from zoo.ops.lti.kernels import scan

    return scan.forward(x, log_a, c, skip, c_reverse, initial_state, cu_seqlens, reverse_lag)


@lti_scan_forward.register_fake
def _(
    x: Tensor,
    log_a: Tensor,
    c: Tensor,
    skip: Tensor | None,
    c_reverse: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse_lag: int,
) -> tuple[Tensor, Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((sequences, *log_a.shape), dtype=torch.float32)


@torch.library.custom_op("zoo::lti_scan_backward", mutates_args=())
def lti_scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    log_a: Tensor,
    c: Tensor,
    skip: Tensor | None,
    c_reverse: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse_lag: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_a, c, skip, c_reverse and initial_state; an empty tensor for each that is absent.

    dfinal: None for zeros.
    """
    from zoo.ops.lti.kernels import scan

    return scan.backward(dy, dfinal, x, log_a, c, skip, c_reverse, initial_state, cu_seqlens, reverse_lag)


@lti_scan_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    log_a: Tensor,
    c: Tensor,
    skip: Tensor | None,
    c_reverse: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse_lag: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (x, log_a, c, skip, c_reverse, initial_state)
    made = [x.new_empty(0) if part is None else part.new_empty(part.shape) for part in given]
    return made[0], made[1], made[2], made[3], made[4], made[5]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reverse_lag = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    dy = torch.zeros_like(inputs[0]) if dy is None else dy
    gradients = lti_scan_backward(dy, dfinal, *inputs, ctx.reverse_lag)
    kept = (None if part is None else grad for part, grad in zip(inputs[:6], gradients, strict=True))
    return (*kept, None, None)


lti_scan_forward.register_autograd(_differentiate, setup_context=_save)
for _op, _forward in ((lti_scan_forward, True), (lti_scan_backward, False)):
    refuse_higher_order(_op, "lti_scan", has_gradient=_forward)


@flop_formula(torch.ops.zoo.lti_scan)
def _forward_flops(
    x: Sequence[int],
    log_a: Sequence[int],
    c: Sequence[int],
    skip: Sequence[int] | None,
    c_reverse: Sequence[int] | None,
    *_: Any,
    **__: Any,
) -> int:
    return (1 if c_reverse is None else 2) * flops(x[0], x[1], x[2], log_a[1])


@flop_formula(torch.ops.zoo.lti_scan_backward)
def _backward_flops(
    dy: Sequence[int],
    dfinal: Sequence[int] | None,
    x: Sequence[int],
    log_a: Sequence[int],
    c: Sequence[int],
    skip: Sequence[int] | None,
    c_reverse: Sequence[int] | None,
    *_: Any,
    **__: Any,
) -> int:
    """The mirrored scan for x; states and four more products with powers, and the pairs of a chunk, for the rest."""
    scan = flops(x[0], x[1], x[2], log_a[1])
    one_way = scan + 2 * x[0] * x[1] * x[2] * (min(64, x[1]) + 8 * log_a[1])
    return one_way if c_reverse is None else 2 * one_way

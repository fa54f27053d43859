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
    """x [B,T,D] -> y [B,T,D], final state [S,D,M,2]. The kernel ahead is the same scan of the tokens in reverse."""
    if x.numel() == 0:
        return scan.untouched(x)
    if x.shape[1] == 1 and scan.cu_seqlens is None:
        return scan_one_token(x, scan)
    y, final = lti_scan_forward(x, scan.log_a, scan.c, scan.D, scan.initial_state, scan.cu_seqlens, 0)
    if scan.c_reverse is not None:
        mirrored = None if scan.cu_seqlens is None else x.shape[1] - scan.cu_seqlens.flip(0)
        ahead, _ = lti_scan_forward(x.flip(1), scan.log_a, scan.c_reverse, None, None, mirrored, scan.reverse_lag)
        y = y + ahead.flip(1)
    return y, final


@torch.library.custom_op("zoo::lti_scan", mutates_args=())
def lti_scan_forward(
    x: Tensor,
    log_a: Tensor,
    c: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lag: int,
) -> tuple[Tensor, Tensor]:
    """y [B,T,D] in the dtype of x, final state [S,D,M,2] in float32; lag 1: the kernel begins at the token before."""
    from zoo.ops.lti.kernels import launch

    return launch.forward(x, log_a, c, skip, initial_state, cu_seqlens, lag)


@lti_scan_forward.register_fake
def _(
    x: Tensor,
    log_a: Tensor,
    c: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lag: int,
) -> tuple[Tensor, Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((sequences, *log_a.shape), dtype=torch.float32)


@torch.library.custom_op("zoo::lti_scan_backward", mutates_args=())
def lti_scan_backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    log_a: Tensor,
    c: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lag: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_a, c, skip and initial_state; an empty tensor for each that is absent."""
    from zoo.ops.lti.kernels import launch

    return launch.backward(dy, dfinal, x, log_a, c, skip, initial_state, cu_seqlens, lag)


@lti_scan_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    log_a: Tensor,
    c: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lag: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dskip = x.new_empty(0) if skip is None else skip.new_empty(skip.shape)
    dinitial = x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return x.new_empty(x.shape), log_a.new_empty(log_a.shape), c.new_empty(c.shape), dskip, dinitial


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.lag = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    gradients = lti_scan_backward(dy, dfinal, *inputs, ctx.lag)
    kept = (None if part is None else grad for part, grad in zip(inputs[:5], gradients, strict=True))
    return (*kept, None, None)


lti_scan_forward.register_autograd(_differentiate, setup_context=_save)
for _op, _forward in ((lti_scan_forward, True), (lti_scan_backward, False)):
    refuse_higher_order(_op, "lti_scan", has_gradient=_forward)


@flop_formula(torch.ops.zoo.lti_scan)
def _forward_flops(x: Sequence[int], log_a: Sequence[int], *_: Any, **__: Any) -> int:
    return flops(x[0], x[1], x[2], log_a[1])


@flop_formula(torch.ops.zoo.lti_scan_backward)
def _backward_flops(
    dy: Sequence[int], dfinal: Sequence[int], x: Sequence[int], log_a: Sequence[int], *_: Any, **__: Any
) -> int:
    """The mirrored scan for x; states and four more products with powers, and the pairs of a chunk, for the rest."""
    scan = flops(x[0], x[1], x[2], log_a[1])
    return scan + 2 * x[0] * x[1] * x[2] * (min(64, x[1]) + 8 * log_a[1])

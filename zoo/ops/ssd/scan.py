"""SSD in plain PyTorch: the semiseparable scan with values dt x and log decays dt A, and the skip D x."""

from __future__ import annotations

from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.semiseparable.chunked import scan
from zoo.ops.ssd.time_step import time_step


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch; shapes as in `ssd`. y is rounded to the dtype of x once, after the skip."""
    step, log_decay = discretise(x, dt, A, dt_bias, dt_softplus, dt_limit)
    y, final_state = scan(C, B, x, log_decay, step, initial_state, cu_seqlens)
    return add_skip(y, x, D), final_state


def discretise(
    x: Tensor, dt: Tensor, A: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Time steps and log decays [B,T,H], both in the accumulation dtype of x."""
    step = time_step(dt, dt_bias, dt_softplus, dt_limit, accumulation_dtype(x.dtype))
    return step, step * A.to(step.dtype)


def add_skip(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    """y + D x in the dtype of x, summed in the accumulation dtype. D: [H] or [H,P]."""
    if D is None:
        return y.to(x.dtype)
    skip = D.to(accumulation_dtype(x.dtype))
    return (y + (skip.unsqueeze(-1) if skip.dim() == 1 else skip) * x).to(x.dtype)

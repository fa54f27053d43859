"""One token of a diagonal system given by its parameters: discretised by one kernel, then stepped by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops.custom import refuse_higher_order


@torch.library.custom_op("zoo::lti_step_factors", mutates_args=())
def step_factors(
    dt: Tensor,
    rate: Tensor,
    turn: Tensor | None,
    B: Tensor | None,
    C: Tensor,
    dt_transform: str,
    rate_transform: str,
    turn_transform: str,
    turn_sign: int,
    disc: str,
    bandlimit: float | None,
) -> tuple[Tensor, Tensor]:
    """A' - 1 and 2 C B' as float32 pairs [D,M,2], made in float64 by one Triton kernel.

    dt: [D,1] or [D,M]. rate: -Re A [S,M], turn: turn_sign Im A [S,M] or None for 0, B: [S,M,2] or None for 1; channel d
    has system d mod S. C: [D,M,2]. Each transform ("exp", "softplus", "sigmoid", "relu" with a floor of 1e-4, "none")
    turns a parameter into its number. disc: "zoh" or "bilinear". bandlimit: C is 0 for modes that turn faster than this
    fraction of half a turn a token; None for no limit.
    """
    from zoo.ops.lti.kernels.system import launch

    return launch(dt, rate, turn, B, C, dt_transform, rate_transform, turn_transform, turn_sign, disc, bandlimit)


@step_factors.register_fake
def _(dt: Tensor, rate: Tensor, turn: Tensor | None, B: Tensor | None, C: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    less, weight = (C.new_empty(C.shape, dtype=torch.float32) for _ in range(2))
    return less, weight


@torch.library.custom_op("zoo::lti_factored_step", mutates_args=("state",))
def factored_step(
    x: Tensor, k: Tensor | None, q: Tensor | None, less: Tensor, weight: Tensor, D: Tensor | None, state: Tensor
) -> Tensor:
    """S = A' S + x in place and y = Re sum_n weight_n S_n + D x, of k x and times q if k and q come.

    x, k, q: [B,D]. less = A' - 1, weight: float32 [D,M,2]. D: [D]. state: float32 [B,D,M,2]. Returns y [B,D].
    """
    from zoo.ops.lti.kernels.step import step

    return step(x, k, q, less, weight, D, state)


@factored_step.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


for _op in (step_factors, factored_step):
    refuse_higher_order(_op, "lti_scan_step", has_gradient=True)

"""The learnt numbers of a state space layer: how they are drawn, and what they stand for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_s4.config import DIAGONALS, MEASURES, S4Config, StateSpaceConfig
from zoo_s4.hippo import Initial, normal_plus_low_rank
from zoo_s4.initial_diagonal import Draw, initial_diagonal

LEAST = 1e-4  # smallest initial value of a positive number, and the floor under "relu"


def positive(parameter: Tensor, transform: str) -> Tensor:
    """The number that a parameter stands for, in float64. All transforms but "none" give positive numbers."""
    wide = parameter.double()
    if transform == "exp":
        return wide.exp()
    if transform == "softplus":
        return F.softplus(wide)
    if transform == "relu":
        return F.relu(wide) + LEAST
    if transform == "sigmoid":
        return torch.sigmoid(wide)
    return wide


def parameter_of(value: Tensor, transform: str) -> Tensor:
    """The parameter that stands for `value`, which is raised to LEAST first ("sigmoid": and kept below 1 - LEAST)."""
    value = value.clamp(min=LEAST)
    if transform == "exp":
        return value.log()
    if transform == "softplus":
        return value + (-torch.expm1(-value)).log()
    if transform == "relu":
        return (value - LEAST).clamp(min=LEAST)
    if transform == "sigmoid":
        return torch.logit(value.clamp(max=1 - LEAST))
    return value


def pairs(value: Tensor) -> Tensor:
    """Complex [...] as float32 pairs [...,2]."""
    return torch.view_as_real(value.resolve_conj()).float()


def complex_of(parameter: Tensor) -> Tensor:
    """Pairs [...,2] as complex128 [...]."""
    return torch.view_as_complex(parameter.double().contiguous())


def initial_dt(config: StateSpaceConfig) -> Tensor:
    """[D,1] or [D,N/2]: time steps drawn log-uniformly from [dt_min, dt_max], through the inverse transform."""
    shape = (config.d_model, 1 if config.tie_dt else config.pairs)
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    steps = (low + (high - low) * torch.rand(shape, dtype=torch.float64)).exp()
    return steps.log().float() if config.dt_transform == "exp" else parameter_of(steps, config.dt_transform).float()


def initial_system(name: str, width: int, rank: int, draw: Draw | None = None) -> Initial:
    """Initial values of one system of N = `width` states.

    name: a measure (its own P, rows beyond its rank are 0) or a diagonal (P complex normal), which `draw` varies.
    Random draws come from torch's generator. Raises ValueError for another name, or a measure of a higher rank.
    """
    if name in MEASURES:
        return normal_plus_low_rank(name, width, rank)
    if name in DIAGONALS:
        return initial_diagonal(name, width, rank, draw)
    raise ValueError(f"no initial system {name!r}; there are: {', '.join((*MEASURES, *DIAGONALS))}")


def draw_of(config: StateSpaceConfig) -> Draw:
    """How a config varies the diagonals of its `init`."""
    return Draw(
        real_scale=config.real_scale,
        imag_scale=config.imag_scale,
        real_random=config.real_random,
        imag_random=config.imag_random,
        b_init=config.b_init,
        b_scale=config.b_scale,
        p_scale=config.p_scale if isinstance(config, S4Config) else 1.0,
        normalize=config.normalize,
    )


def initial_systems(config: StateSpaceConfig, width: int, rank: int) -> Initial:
    """Systems of N = `width` states: a [S,N/2], P [R,S,N/2], B [S,N/2]; each name of `init` in equal parts."""
    each = config.systems // len(config.inits)
    made: list[Initial] = []
    for name in config.inits:
        if name in MEASURES:
            made += [initial_system(name, width, rank)] * each
        else:  # these draw random numbers
            made += [initial_system(name, width, rank, draw_of(config)) for _ in range(each)]
    return Initial(
        torch.stack([system.a for system in made]),
        torch.stack([system.P for system in made], 1),
        torch.stack([system.B for system in made]),
    )


def shared(part: Tensor, channels: int, axis: int) -> Tensor:
    """The S systems along `axis` for `channels` channels: channel d has system d mod S."""
    if part.shape[axis] == channels:  # each its own: a decode step copies nothing
        return part
    sizes = [1] * part.dim()
    sizes[axis] = channels // part.shape[axis]
    return part.repeat(sizes)

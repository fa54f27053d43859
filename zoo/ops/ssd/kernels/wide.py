"""SSD backward of any served width: wide heads as several heads of the same decays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.ops.ssd.kernels import launch
from zoo.ops.ssd.widths import P_MOST, fits, served


def serves(x: Tensor, B: Tensor) -> bool:
    """Whether these kernels take x [B,T,H,P] and B [B,T,G,N]."""
    return x.dtype == torch.bfloat16 and served(x.shape[3], B.shape[3], x.shape[2], B.shape[2])


@dataclass(frozen=True)
class _Cut:
    """Every head of P channels as `more` neighbouring heads."""

    heads: int
    channels: int
    more: int

    def values(self, x: Tensor) -> Tensor:
        """[B,T,H,P] -> [B,T,H more,P/more]."""
        return x if self.more == 1 else x.unflatten(3, (self.more, -1)).flatten(2, 3)

    def states(self, state: Tensor | None) -> Tensor | None:
        """[S,H,P,N] -> [S,H more,P/more,N]."""
        if state is None:
            return None
        return state.reshape(state.shape[0], self.heads * self.more, self.channels // self.more, -1)

    def repeated(self, part: Tensor) -> Tensor:
        """[...,H] -> [...,H more]."""
        return part if self.more == 1 else part.repeat_interleave(self.more, -1)

    def summed(self, grad: Tensor) -> Tensor:
        """[...,H more] -> [...,H]."""
        return grad if self.more == 1 else grad.unflatten(-1, (self.heads, self.more)).sum(-1)

    def whole_values(self, y: Tensor) -> Tensor:
        return y if self.more == 1 else y.unflatten(2, (self.heads, self.more)).flatten(3)

    def whole_states(self, state: Tensor | None) -> Tensor | None:
        return None if state is None else state.reshape(state.shape[0], self.heads, self.channels, -1)


def backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, has_softplus: bool, limits: tuple[float, float], start: Tensor | None,
    cu_seqlens: Tensor | None, dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, dt_bias and start, contiguous; those of A, D, dt_bias and start in float32.

    dx: where the gradient of x goes, [B,T,H,P] with one stride from token to token; None for a tensor of its own.
    """
    cut, dtype = _cut(x, B), dt.dtype
    if cut.more > 1:
        dt = dt.float()  # parts of its gradient are added in float32
    D, dt_bias = (None if part is None else cut.repeated(part) for part in (D, dt_bias))
    own, ddt, dA, dB, dC, dD, dbias, dstart = launch.backward(
        cut.values(dy), cut.states(dfinal), cut.values(x), cut.repeated(dt), cut.repeated(A), B, C, D, dt_bias,
        has_softplus, limits, cut.states(start), cu_seqlens, None if dx is None else cut.values(dx),
    )  # fmt: skip
    dD, dbias = (None if part is None else cut.summed(part) for part in (dD, dbias))
    dx = cut.whole_values(own) if dx is None else dx
    return dx, cut.summed(ddt).to(dtype), cut.summed(dA), dB, dC, dD, dbias, cut.whole_states(dstart)


def _cut(x: Tensor, B: Tensor) -> _Cut:
    heads, channels = x.shape[2:]
    return _Cut(heads, channels, 1 if fits(channels, B.shape[3]) else channels // P_MOST)

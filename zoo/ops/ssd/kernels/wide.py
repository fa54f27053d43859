"""SSD of any served width: wide heads as several heads of the same decays, wide states as a sum of narrower ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.ops.ssd.kernels import launch
from zoo.ops.ssd.widths import N_MOST, P_MOST, WIDTHS, served


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

    def whole_states(self, state: Tensor) -> Tensor:
        return state.reshape(state.shape[0], self.heads, self.channels, -1)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    has_softplus: bool, limits: tuple[float, float], start: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B,T,H,P] and the final state [S,H,P,N], float32. A, D, dt_bias: float32 [H]; start: float32 [S,H,P,N]."""
    cut = _cut(x, B)
    x, dt, A, start = cut.values(x), cut.repeated(dt), cut.repeated(A), cut.states(start)
    D, dt_bias = (None if part is None else cut.repeated(part) for part in (D, dt_bias))
    found = [
        launch.forward(
            x, dt, A, own_B, own_C, None if n else D, dt_bias, has_softplus, limits, _own(start, n), cu_seqlens
        )
        for n, (own_B, own_C) in enumerate(zip(B.split(N_MOST, 3), C.split(N_MOST, 3), strict=True))
    ]
    y, final = zip(*found, strict=True)
    return cut.whole_values(_sum(y)), cut.whole_states(_joined(final))


def backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, has_softplus: bool, limits: tuple[float, float], start: Tensor | None,
    cu_seqlens: Tensor | None, dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, dt_bias and start, contiguous; those of A, D, dt_bias and start in float32.

    dx: where the gradient of x goes, [B,T,H,P] with one stride from token to token; None for a tensor of its own.
    """
    cut, dtype = _cut(x, B), dt.dtype
    if cut.more > 1 or B.shape[3] > N_MOST:
        dt = dt.float()  # parts of its gradient are added in float32
    x, dy, dt, A = cut.values(x), cut.values(dy), cut.repeated(dt), cut.repeated(A)
    D, dt_bias = (None if part is None else cut.repeated(part) for part in (D, dt_bias))
    dfinal, start = cut.states(dfinal), cut.states(start)
    several = B.shape[3] > N_MOST
    found = [
        launch.backward(
            dy, _own(dfinal, n), x, dt, A, own_B, own_C, None if n else D, dt_bias, has_softplus, limits,
            _own(start, n), cu_seqlens, None if dx is None or several else cut.values(dx),
        )
        for n, (own_B, own_C) in enumerate(zip(B.split(N_MOST, 3), C.split(N_MOST, 3), strict=True))
    ]  # fmt: skip
    parts, ddt, dA, dB, dC, dD, dbias, dstart = zip(*found, strict=True)
    if dx is None:
        dx = cut.whole_values(_sum(parts))
    elif several:
        dx.copy_(cut.whole_values(_sum(parts)))
    return (
        dx,
        cut.summed(_sum(ddt)).to(dtype),
        cut.summed(_sum(dA)),
        _joined(dB),
        _joined(dC),
        None if D is None else cut.summed(dD[0]),
        None if dt_bias is None else cut.summed(_sum(dbias)),
        cut.whole_states(_joined(dstart)),
    )


def _cut(x: Tensor, B: Tensor) -> _Cut:
    heads, channels = x.shape[2:]
    fits = channels in WIDTHS and channels * min(B.shape[3], N_MOST) <= P_MOST * N_MOST
    return _Cut(heads, channels, 1 if fits else channels // P_MOST)


def _own(state: Tensor | None, n: int) -> Tensor | None:
    if state is None or state.shape[3] <= N_MOST:
        return state
    return state[..., n * N_MOST : (n + 1) * N_MOST].contiguous()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 3)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Added in float32, in the dtype of the parts."""
    total = parts[0]
    for part in parts[1:]:
        total = total.float() + part
    return total.to(parts[0].dtype)

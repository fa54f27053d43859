"""The definition of the long convolution: the Toeplitz matrix of each channel times its tokens."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.long_convolution.call import Convolution

ROWS = 256  # of the matrices, made at a time


def convolve_reference(x: Tensor, call: Convolution) -> Tensor:
    """x [B,T,D] -> y [B,T,D], any dtype, differentiable any number of times."""
    inner = accumulation_dtype(x.dtype)
    u = x.to(inner) if call.pre_gate is None else x.to(inner) * call.pre_gate.to(inner)
    kernel = call.kernel.to(inner)
    ahead = None if call.reverse_kernel is None else call.reverse_kernel.to(inner)
    if call.cu_seqlens is None:
        y = toeplitz(u, kernel, ahead, call.reverse_lag)
    else:
        runs = itertools.pairwise(call.cu_seqlens.tolist())
        parts = [toeplitz(u[:, first:end], kernel, ahead, call.reverse_lag) for first, end in runs]
        y = torch.cat(parts, 1)
    if call.D is not None:
        y = y + call.D.to(inner) * u
    if call.post_gate is not None:
        y = y * call.post_gate.to(inner)
    return y.to(x.dtype)


def toeplitz(u: Tensor, kernel: Tensor, ahead: Tensor | None, reverse_lag: int) -> Tensor:
    """y_i = sum_{j <= i} kernel_{i-j} u_j + sum_{j >= i + reverse_lag} ahead_{j-i-reverse_lag} u_j for u [B,T,D]."""
    steps = torch.arange(u.shape[1], device=u.device)
    parts = [u[:, :0]]
    for rows in steps.split(ROWS):
        lag = rows.unsqueeze(1) - steps  # [rows, T]
        matrix = _at(kernel, lag)
        if ahead is not None:
            matrix = matrix + _at(ahead, -lag - reverse_lag)
        parts.append(torch.einsum("dij,bjd->bid", matrix, u))
    return torch.cat(parts, 1)


def _at(taps: Tensor, lag: Tensor) -> Tensor:
    """taps [D,K] at lags [I,J], 0 where there is no such tap: [D,I,J]."""
    inside = (lag >= 0) & (lag < taps.shape[1])
    return torch.where(inside, taps[:, lag.clamp(0, taps.shape[1] - 1)], 0.0)

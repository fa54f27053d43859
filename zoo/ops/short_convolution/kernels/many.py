"""Short convolution of many taps over whole rows: a lane owns several neighbouring tokens of its channels.

A value that is loaded meets all the taps that lead to those tokens, whose weights wait in registers and move on by one
token a step: one load for OWN products, where a loop over shifted tiles has one for each.
"""

# ruff: noqa: RUF005  # Triton adds tuples up, and takes no starred ones
# mypy: disable-error-code="assignment, unreachable, var-annotated"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.rows import cdiv

ROWS, OWN, BLOCK_D = 4, 8, 128  # groups of tokens, tokens of a group, channels of a program
SEGMENT = 512  # tokens of a program that sums over them


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tuple of COUNT tiles of zeros."""
    tiles = ()
    for _i in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros([ROWS, BLOCK_D], tl.float32),)
    return tiles


@triton.jit
def tokens_at(row_ptr, p, T, stride, d, in_d):
    """Float32 [ROWS, BLOCK_D] at the tokens p [ROWS]; zeros outside the row."""
    inside = ((p >= 0) & (p < T))[:, None] & in_d[None, :]
    return tl.load(row_ptr + p[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)


@launched
def many_taps_kernel(
    x_ptr, taps_ptr, bias_ptr, y_ptr,  # [B,T,D] [W,D] [D] -> [B,T,D]
    T, D, x_stride_b, x_stride_t,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, REVERSE: tl.constexpr,
    ROWS: tl.constexpr, OWN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y_t = sum_j taps_j x_{t-(W-1)+j}, or with REVERSE the gradient of x for x = dy: sum_j taps_j x_{t+(W-1)-j}.

    One program owns ROWS x OWN tokens of BLOCK_D channels. Step s loads one value per group of tokens; the i-th token
    of the group, counted in the direction of time, or against it, meets it with tap s - i.
    """
    blocks = tl.cdiv(T, ROWS * OWN)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks).to(tl.int64) * (ROWS * OWN) + tl.arange(0, ROWS) * OWN
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    row_ptr = x_ptr + row * x_stride_b
    sums = zeros(OWN, ROWS, BLOCK_D)
    weights = zeros(OWN, 1, BLOCK_D)
    for s in range(0, W + OWN - 1):
        if REVERSE:
            p = t + (W + OWN - 2 - s)
        else:
            p = t + (s - (W - 1))
        x = tokens_at(row_ptr, p, T, x_stride_t, d, in_d)
        in_taps = in_d & (d * 0 + s < W)
        moved = (tl.load(taps_ptr + s * D + d, mask=in_taps, other=0.0).to(tl.float32)[None, :],)
        for i in tl.static_range(OWN - 1):
            moved = moved + (weights[i],)
        weights = moved
        grown = ()
        for i in tl.static_range(OWN):
            grown = grown + (sums[i] + x * weights[i],)
        sums = grown
    for i in tl.static_range(OWN):
        if REVERSE:
            token = t + (OWN - 1 - i)
        else:
            token = t + i
        y = sums[i]
        if HAS_BIAS:
            y += tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
        at = y_ptr + (row * T + token[:, None]) * D + d[None, :]
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(token < T)[:, None] & in_d[None, :])


@launched
def many_dweight_kernel(
    dy_ptr, x_ptr, partial_ptr,  # [B,T,D] [B,T,D] -> [programs,W+1,D]: taps, bias
    T, D, dy_stride_b, dy_stride_t, x_stride_b, x_stride_t,
    W: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, OWN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns OWN taps of BLOCK_D channels and sums over SEGMENT tokens, in ROWS pieces side by side."""
    blocks = tl.cdiv(T, SEGMENT)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks).to(tl.int64) * SEGMENT + tl.arange(0, ROWS) * (SEGMENT // ROWS)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    tap = tl.program_id(2) * OWN
    x_row, dy_row = x_ptr + row * x_stride_b, dy_ptr + row * dy_stride_b
    met = t + (tap - (W - 1))  # the token that the first of the taps meets
    window = ()
    for i in tl.static_range(OWN):
        window = window + (tokens_at(x_row, met + (i - 1), T, x_stride_t, d, in_d),)
    sums = zeros(OWN, ROWS, BLOCK_D)
    dbias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for s in range(0, SEGMENT // ROWS):
        moved = ()
        for i in tl.static_range(OWN - 1):
            moved = moved + (window[i + 1],)
        window = moved + (tokens_at(x_row, met + (s + OWN - 1), T, x_stride_t, d, in_d),)
        g = tokens_at(dy_row, t + s, T, dy_stride_t, d, in_d)
        dbias += g
        grown = ()
        for i in tl.static_range(OWN):
            grown = grown + (sums[i] + g * window[i],)
        sums = grown
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (W + 1) * D + d
    for i in tl.static_range(OWN):
        tl.store(partial + (tap + i) * D, tl.sum(sums[i], axis=0), mask=in_d & (d * 0 + tap + i < W))
    tl.store(partial + W * D, tl.sum(dbias, axis=0), mask=in_d & (d * 0 + tap == 0))


def many_taps(x: Tensor, taps: Tensor, bias: Tensor | None, *, reverse: bool) -> Tensor:
    """y, or with `reverse` the gradient of x from x = dy; x [B,T,D] with stride 1 along D, taps [W,D] contiguous."""
    batch, tokens, channels = x.shape
    y = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    many_taps_kernel[(batch * cdiv(tokens, ROWS * OWN), cdiv(channels, BLOCK_D))](
        x, taps, x if bias is None else bias, y, tokens, channels, x.stride(0), x.stride(1),
        W=taps.shape[0], HAS_BIAS=bias is not None, REVERSE=reverse, ROWS=ROWS, OWN=OWN, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return y


def many_dweight(dy: Tensor, x: Tensor, width: int) -> Tensor:
    """Sums over all tokens for each tap, and for the bias, float32 [W+1,D]; dy, x [B,T,D] with stride 1 along D."""
    batch, tokens, channels = x.shape
    programs = batch * cdiv(tokens, SEGMENT)
    partial = torch.empty((programs, width + 1, channels), dtype=torch.float32, device=x.device)
    many_dweight_kernel[(programs, cdiv(channels, BLOCK_D), cdiv(width, OWN))](
        dy, x, partial, tokens, channels, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1),
        W=width, SEGMENT=SEGMENT, ROWS=ROWS, OWN=OWN, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return partial.sum(0)

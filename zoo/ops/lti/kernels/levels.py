"""Two-level tables of powers for kernels of diagonal systems, and the sum over the coarse level: their transpose."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.rows import cdiv
from zoo.ops.lti.kernels.phases import exponential
from zoo.ops.semiseparable.kernels.launch import on_device

BLOCK = 32  # modes, and lags, of a tile
WARPS = 4


@triton.jit(do_not_specialize=["rows", "count", "spacing"])
def level_kernel(
    log_a_ptr, c_ptr, out_ptr,  # [d,M,2] [S,d,M,2] by stride of S; [S,d,2M,count] float32
    rows, count, spacing, c_stride_s,
    M: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK of the rows = d M modes and BLOCK of the lags l = 0, spacing, 2 spacing, ...

    out holds Re and Im e^{l log_a}, or, WEIGHTED, Re and -Im of 2 c e^{l log_a}; made in float64, rounded once.
    """
    blocks = (rows + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    mask = row < rows
    rate = tl.load(log_a_ptr + row * 2, mask=mask, other=0.0).to(tl.float64)
    turn = tl.load(log_a_ptr + row * 2 + 1, mask=mask, other=0.0).to(tl.float64)
    lag = (index * spacing).to(tl.float64)
    re, im = exponential(rate[:, None], turn[:, None], lag[None, :])
    if WEIGHTED:
        c_ptr += sequence * c_stride_s
        c_re = 2.0 * tl.load(c_ptr + row * 2, mask=mask, other=0.0).to(tl.float64)[:, None]
        c_im = 2.0 * tl.load(c_ptr + row * 2 + 1, mask=mask, other=0.0).to(tl.float64)[:, None]
        seen = c_re * re - c_im * im
        im = -(c_re * im + c_im * re)
        re = seen
    place = (sequence * rows * 2 + (row // M) * 2 * M + row % M) * count
    at = out_ptr + place[:, None] + index[None, :]
    inside = mask[:, None] & (index < count)[None, :]
    tl.store(at, re.to(tl.float32), mask=inside)
    tl.store(at + M * count, im.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["channels", "count", "spacing"])
def fold_kernel(
    log_a_ptr, inner_ptr, out_ptr,  # [d,M,2]; [S,d,count,2M] float32; [S,d,M,2] float32 by stride of S
    channels, count, spacing, out_stride_s,
    M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK modes of one channel and sequence: out = sum_q inner_q e^{q spacing log_a}."""
    channel = (tl.program_id(0) % channels).to(tl.int64)
    sequence = (tl.program_id(0) // channels).to(tl.int64)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = m < M
    rate = tl.load(log_a_ptr + (channel * M + m) * 2, mask=mask, other=0.0).to(tl.float64)[None, :]
    turn = tl.load(log_a_ptr + (channel * M + m) * 2 + 1, mask=mask, other=0.0).to(tl.float64)[None, :]
    inner_ptr += (sequence * channels + channel) * count * 2 * M
    sum_re = tl.zeros([BLOCK], tl.float64)
    sum_im = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        q = first + tl.arange(0, BLOCK)
        re, im = exponential(rate, turn, (q * spacing).to(tl.float64)[:, None])
        re = re.to(tl.float32)
        im = im.to(tl.float32)
        at = inner_ptr + q[:, None] * (2 * M) + m[None, :]
        inside = (q < count)[:, None] & mask[None, :]
        x_re = tl.load(at, mask=inside, other=0.0)
        x_im = tl.load(at + M, mask=inside, other=0.0)
        sum_re += tl.sum(tl.where(inside, x_re * re - x_im * im, 0.0), axis=0)
        sum_im += tl.sum(tl.where(inside, x_re * im + x_im * re, 0.0), axis=0)
    out = out_ptr + sequence * out_stride_s + (channel * M + m) * 2
    tl.store(out, sum_re.to(tl.float32), mask=mask)
    tl.store(out + 1, sum_im.to(tl.float32), mask=mask)


def level(log_a: Tensor, c: Tensor | None, count: int, spacing: int) -> Tensor:
    """Powers of modes log_a [d,M,2] at lags 0, spacing, .. as [1,d,2M,count] float32; weighted by 2 c [S,d,M,2]."""
    channels, modes = log_a.shape[:2]
    sequences = 1 if c is None else c.shape[0]
    out = torch.empty(sequences, channels, 2 * modes, count, dtype=torch.float32, device=log_a.device)
    grid = (sequences * cdiv(channels * modes, BLOCK), cdiv(count, BLOCK))
    with on_device(log_a):
        level_kernel[grid](
            log_a, c, out, channels * modes, count, spacing, 0 if c is None else c.stride(0),
            M=modes, WEIGHTED=c is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out


def kernel_block(log_a: Tensor, c: Tensor, out: Tensor, coarse: int, fine: int) -> None:
    """Fill out [S,d,length], length <= coarse fine, rows contiguous, with the kernels of log_a [d,M,2], c [S,d,M,2]."""
    left, right = level(log_a, c, coarse, fine), level(log_a, None, fine, 1)[0]
    for weighted, kernel in zip(left, out, strict=True):
        if kernel.shape[1] == coarse * fine:
            torch.bmm(weighted.mT, right, out=kernel.unflatten(1, (coarse, fine)))
        else:
            kernel.copy_(torch.bmm(weighted.mT, right).flatten(1)[:, : kernel.shape[1]])


def moment_block(log_a: Tensor, tiles: Tensor, out: Tensor) -> None:
    """Fill out [S,d,M,2], rows contiguous, with the moments of weights [S,d,coarse,fine] under log_a [d,M,2]."""
    sequences, channels, coarse, fine = tiles.shape
    modes = log_a.shape[1]
    inner = torch.matmul(tiles, level(log_a, None, fine, 1).mT)
    with on_device(log_a):
        fold_kernel[(sequences * channels, cdiv(modes, BLOCK))](
            log_a, inner, out, channels, coarse, fine, out.stride(0), M=modes, BLOCK=BLOCK, num_warps=WARPS
        )

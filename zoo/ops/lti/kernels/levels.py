"""Kernels of diagonal systems from two-level tables of powers, and their transpose, the moments."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import dot
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.lti.kernels.phases import exponential

BLOCK = 32  # modes, and lags, of a tile
WARPS = 4
SPAN = (64, 128, 4, 3)  # coarse and fine lags of a program that makes kernels, at most; warps, stages
MOMENT = (16, 128, 4, 3)  # of one that makes moments


@launched(do_not_specialize=["rows", "count", "spacing"])
def level_kernel(
    log_a_ptr, c_ptr, out_ptr,  # [d,M,2] [S,d,M,2] by stride of S; [S,d,2M,count], or [S,d,count,2M], float32
    rows, count, spacing, c_stride_s,
    M: tl.constexpr, WEIGHTED: tl.constexpr, MODES_LAST: tl.constexpr, BLOCK: tl.constexpr,
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
    place = (sequence * rows * 2 + (row // M) * 2 * M) * count
    inside = mask[:, None] & (index < count)[None, :]
    if MODES_LAST:
        at = out_ptr + (place + row % M)[:, None] + (index * (2 * M))[None, :]
        across = M
    else:
        at = out_ptr + (place + row % M * count)[:, None] + index[None, :]
        across = M * count
    tl.store(at, re.to(tl.float32), mask=inside)
    tl.store(at + across, im.to(tl.float32), mask=inside)


@launched(do_not_specialize=["channels"])
def span_kernel(
    left_ptr, right_ptr, out_ptr,  # [S,d,2M,coarse] and [d,2M,fine] float32; [S,d,length] float32 by stride of S
    channels, coarse, fine, length, out_stride_s,
    N: tl.constexpr, WHOLE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_Q coarse and BLOCK_R fine lags of one kernel: the sum of the products over N = 2M.

    WHOLE: length = coarse fine, so that several lags can be stored at a time.
    """
    channel = (tl.program_id(0) % channels).to(tl.int64)
    sequence = (tl.program_id(0) // channels).to(tl.int64)
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    left_ptr += (sequence * channels + channel) * N * coarse
    right_ptr += channel * N * fine
    total = tl.zeros([BLOCK_Q, BLOCK_R], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        in_left = (n < N)[:, None] & (q < coarse)[None, :]
        left = tl.load(left_ptr + n[:, None] * coarse + q[None, :], mask=in_left, other=0.0)
        in_right = (n < N)[:, None] & (r < fine)[None, :]
        right = tl.load(right_ptr + n[:, None] * fine + r[None, :], mask=in_right, other=0.0)
        total = dot(tl.trans(left), right, total)
    lag = q[:, None] * fine + r[None, :]
    inside = (q < coarse)[:, None] & (r < fine)[None, :]
    if not WHOLE:
        inside = inside & (lag < length)
    tl.store(out_ptr + sequence * out_stride_s + channel * length + lag, total, mask=inside)


@launched(do_not_specialize=["channels"])
def moment_kernel(
    high_ptr, low_ptr,  # e^{q fine log_a} [d,coarse,2M], e^{r log_a} [d,fine,2M], float32
    weights_ptr, out_ptr,  # [S,d,length] by strides; [kinds,S,d,M,2] float32 by strides
    channels, coarse, fine, length, weights_stride_s, weights_stride_d, out_stride_k, out_stride_s,
    M: tl.constexpr, WHOLE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M modes of one channel and sequence: sum_l w_l e^{l log_a}, or, as kind 1, of l w_l.

    l = q fine + r: products over q, then a sum over r, in float64 beyond BLOCK_R. Both operands of a product have its
    sum along their slow axis: read along the fast one, they would meet one bank of shared memory.
    """
    channel = (tl.program_id(0) % channels).to(tl.int64)
    sequence = (tl.program_id(0) // channels).to(tl.int64)
    kind = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = m < M
    weights_ptr += sequence * weights_stride_s + channel * weights_stride_d
    high_ptr += channel * 2 * M * coarse
    low_ptr += channel * 2 * M * fine
    sum_re = tl.zeros([BLOCK_M], tl.float64)
    sum_im = tl.zeros([BLOCK_M], tl.float64)
    for begin in range(0, fine, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        x_re = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
        x_im = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
        for first in range(0, coarse, BLOCK_Q):
            q = first + tl.arange(0, BLOCK_Q)
            lag = q[:, None] * fine + r[None, :]
            inside = (q < coarse)[:, None] & (r < fine)[None, :]
            if not WHOLE:
                inside = inside & (lag < length)
            weight = tl.load(weights_ptr + lag, mask=inside, other=0.0).to(tl.float32)
            weight = tl.trans(weight * tl.where(kind == 1, lag, 1).to(tl.float32))  # [BLOCK_R, BLOCK_Q]
            at = high_ptr + q[:, None] * (2 * M) + m[None, :]
            in_high = (q < coarse)[:, None] & mask[None, :]
            x_re = dot(weight, tl.load(at, mask=in_high, other=0.0), x_re)
            x_im = dot(weight, tl.load(at + M, mask=in_high, other=0.0), x_im)
        at = low_ptr + r[:, None] * (2 * M) + m[None, :]
        in_low = (r < fine)[:, None] & mask[None, :]
        re = tl.load(at, mask=in_low, other=0.0)
        im = tl.load(at + M, mask=in_low, other=0.0)
        sum_re += tl.sum(x_re * re - x_im * im, axis=0)
        sum_im += tl.sum(x_re * im + x_im * re, axis=0)
    at = out_ptr + kind * out_stride_k + sequence * out_stride_s + (channel * M + m) * 2
    tl.store(at, sum_re.to(tl.float32), mask=mask)
    tl.store(at + 1, sum_im.to(tl.float32), mask=mask)


def level(log_a: Tensor, c: Tensor | None, count: int, spacing: int, *, modes_last: bool = False) -> Tensor:
    """Powers of modes log_a [d,M,2] at lags 0, spacing, .. as [1,d,2M,count] float32; weighted by 2 c [S,d,M,2].

    modes_last: as [1,d,count,2M].
    """
    channels, modes = log_a.shape[:2]
    sequences = 1 if c is None else c.shape[0]
    shape = (count, 2 * modes) if modes_last else (2 * modes, count)
    out = torch.empty(sequences, channels, *shape, dtype=torch.float32, device=log_a.device)
    grid = (sequences * cdiv(channels * modes, BLOCK), cdiv(count, BLOCK))
    with on_device(log_a):
        level_kernel[grid](
            log_a, c, out, channels * modes, count, spacing, 0 if c is None else c.stride(0),
            M=modes, WEIGHTED=c is not None, MODES_LAST=modes_last, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out


def _block(most: int, count: int) -> int:
    return max(16, min(most, next_power_of_2(count)))


def kernel_block(log_a: Tensor, c: Tensor, out: Tensor, coarse: int, fine: int) -> None:
    """Fill out [S,d,length], length <= coarse fine, rows contiguous, with the kernels of log_a [d,M,2], c [S,d,M,2].

    Products are IEEE float32 whatever the process allows cuBLAS.
    """
    left, right = level(log_a, c, coarse, fine), level(log_a, None, fine, 1)
    sequences, channels, length = out.shape
    most_q, most_r, warps, stages = SPAN
    block_q, block_r = _block(most_q, coarse), _block(most_r, fine)
    with on_device(log_a):
        span_kernel[(sequences * channels, cdiv(coarse, block_q), cdiv(fine, block_r))](
            left, right, out, channels, coarse, fine, length, out.stride(0),
            N=left.shape[2], WHOLE=length == coarse * fine, BLOCK_Q=block_q, BLOCK_R=block_r, BLOCK_N=16,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def moment_block(log_a: Tensor, weights: Tensor, out: Tensor, coarse: int, fine: int) -> None:
    """Fill out [kinds,S,d,M,2], rows contiguous, with moments of weights [S,d,length <= coarse fine], of log_a [d,M,2].

    The second kind, if there is room for it, are the moments of l weights_l. Products are IEEE float32.
    """
    sequences, channels, length = weights.shape
    modes = log_a.shape[1]
    high = level(log_a, None, coarse, fine, modes_last=True)
    low = level(log_a, None, fine, 1, modes_last=True)
    most_q, most_r, warps, stages = MOMENT
    block_q, block_r = _block(most_q, coarse), _block(most_r, fine)
    with on_device(log_a):
        moment_kernel[(sequences * channels, out.shape[0], cdiv(modes, BLOCK))](
            high, low, weights, out, channels, coarse, fine, length, *weights.stride()[:2], *out.stride()[:2],
            M=modes, WHOLE=length == coarse * fine, BLOCK_Q=block_q, BLOCK_R=block_r, BLOCK_M=BLOCK,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip

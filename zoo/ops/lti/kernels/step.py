"""One token of the diagonal scan in place, and of LTI attention with heads of one channel, which gates it.

A program walks over a few sequences of its channels, so that their factors are read once for all of them; the next
state is under way while one is worked on. Pairs (re, im) lie side by side, so a row is one contiguous piece.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.rows import cdiv, next_power_of_2, rows, warps_for

TILE = 2048  # numbers of the state that one program holds at a time, 16 in each of 128 threads
SEQUENCES = 4  # of one program
FACTORS = 256  # modes of a program that makes factors


@launched
def factor_kernel(
    log_a_ptr, c_ptr, rate_ptr, weight_ptr,  # [D M,2] [D M,2] -> [D M,2] [D M,2], float32
    modes, BLOCK: tl.constexpr,
):  # fmt: skip
    """e^{log_a} - 1 and 2 c, made in float64: a factor near 1 would round the rate of a slow mode away."""
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = m < modes
    re = tl.load(log_a_ptr + m * 2, mask=live, other=0.0).to(tl.float64)
    im = tl.load(log_a_ptr + m * 2 + 1, mask=live, other=0.0).to(tl.float64)
    size = tl.exp(re)
    tl.store(rate_ptr + m * 2, (size * tl.cos(im) - 1.0).to(tl.float32), mask=live)
    tl.store(rate_ptr + m * 2 + 1, (size * tl.sin(im)).to(tl.float32), mask=live)
    c_re = tl.load(c_ptr + m * 2, mask=live, other=0.0).to(tl.float64)
    c_im = tl.load(c_ptr + m * 2 + 1, mask=live, other=0.0).to(tl.float64)
    tl.store(weight_ptr + m * 2, (2.0 * c_re).to(tl.float32), mask=live)
    tl.store(weight_ptr + m * 2 + 1, (2.0 * c_im).to(tl.float32), mask=live)


@triton.jit
def _pairs(part, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """[BLOCK_D, 2 BLOCK_M] as real and imaginary parts [BLOCK_D, BLOCK_M]."""
    return tl.split(tl.reshape(part, [BLOCK_D, BLOCK_M, 2]))


@launched
def modes_step_kernel(
    x_ptr, k_ptr, q_ptr, rate_ptr, weight_ptr, skip_ptr,  # [B,D] [B,D] [B,D] [D,M,2] [D,M,2] [D]
    state_ptr, y_ptr,  # [B,D,M,2] in place, -> [B,D]
    batch, D, x_stride_b, k_stride_b, q_stride_b, state_stride_b, state_stride_d,
    M: tl.constexpr, GATED: tl.constexpr, HAS_D: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program owns a tile [BLOCK_D, 2 M] of the states of SEQUENCES sequences, one after the other."""
    blocks = tl.cdiv(D, BLOCK_D)
    first = (tl.program_id(0) // blocks).to(tl.int64) * SEQUENCES
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, 2 * BLOCK_M)
    in_n = n < 2 * M
    in_d = d < D
    in_tile = in_d[:, None] & in_n[None, :]
    tile = state_ptr + d.to(tl.int64)[:, None] * state_stride_d + n[None, :]
    upcoming = tl.load(tile + first * state_stride_b, mask=in_tile, other=0.0)  # [BLOCK_D, 2 BLOCK_M]
    factor = d.to(tl.int64)[:, None] * (2 * M) + n[None, :]
    less, turn = _pairs(tl.load(rate_ptr + factor, mask=in_tile, other=0.0), BLOCK_D, BLOCK_M)
    c_re, c_im = _pairs(tl.load(weight_ptr + factor, mask=in_tile, other=0.0), BLOCK_D, BLOCK_M)
    for i in tl.static_range(SEQUENCES):
        b = first + i
        here = d < tl.where(b < batch, D, 0)
        s_re, s_im = _pairs(upcoming, BLOCK_D, BLOCK_M)
        if i + 1 < SEQUENCES:
            ahead = d < tl.where(b + 1 < batch, D, 0)
            in_ahead = ahead[:, None] & in_n[None, :]
            upcoming = tl.load(tile + (b + 1) * state_stride_b, mask=in_ahead, other=0.0)
        x = tl.load(x_ptr + b * x_stride_b + d, mask=here, other=0.0).to(tl.float32)
        if GATED:
            x = x * tl.load(k_ptr + b * k_stride_b + d, mask=here, other=0.0).to(tl.float32)
        re = x[:, None] + (s_re + (less * s_re - turn * s_im))
        im = s_im + (less * s_im + turn * s_re)
        after = tl.reshape(tl.join(re, im), [BLOCK_D, 2 * BLOCK_M])
        tl.store(tile + b * state_stride_b, after, mask=here[:, None] & in_n[None, :])
        y = tl.sum(c_re * re - c_im * im, axis=1)
        if HAS_D:
            y += tl.load(skip_ptr + d, mask=in_d, other=0.0).to(tl.float32) * x
        if GATED:
            y = y * tl.load(q_ptr + b * q_stride_b + d, mask=here, other=0.0).to(tl.float32)
        tl.store(y_ptr + b * D + d, y.to(y_ptr.dtype.element_ty), mask=here)


def factors(log_a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """e^{log_a} - 1 and 2 c as float32 pairs, from log_a and c [D,M,2] of any floating dtype."""
    rate, weight = (torch.empty(log_a.shape, dtype=torch.float32, device=log_a.device) for _ in range(2))
    modes = log_a.numel() // 2
    factor_kernel[(cdiv(modes, FACTORS),)](
        log_a.contiguous(), c.contiguous(), rate, weight, modes, BLOCK=FACTORS, num_warps=4
    )
    return rate, weight


def launch(
    x: Tensor, k: Tensor | None, q: Tensor | None, log_a: Tensor, c: Tensor, D: Tensor | None, state: Tensor
) -> Tensor:
    """y [B,D] of x [B,D], or q times that of k x if k and q [B,D] come; state [B,D,M,2] in place."""
    with on_device(x):
        rate, weight = factors(log_a, c)
    return step(x, k, q, rate, weight, D, state)


def step(
    x: Tensor, k: Tensor | None, q: Tensor | None, rate: Tensor, weight: Tensor, D: Tensor | None, state: Tensor
) -> Tensor:
    """As `launch`, with what `factors` makes, contiguous."""
    batch, channels = x.shape
    modes = rate.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x = rows(x)
    key, query = (x if part is None else rows(part) for part in (k, q))
    own = state if state.stride()[2:] == (2, 1) else state.contiguous()
    block_m: int = next_power_of_2(modes)
    block_d = min(next_power_of_2(channels), max(1, TILE // (2 * block_m)))
    sequences = min(SEQUENCES, next_power_of_2(batch))
    with on_device(x):
        modes_step_kernel[(cdiv(batch, sequences) * cdiv(channels, block_d),)](
            x, key, query, rate, weight, rate if D is None else D.contiguous(), own, y,
            batch, channels, x.stride(0), key.stride(0), query.stride(0), own.stride(0), own.stride(1),
            M=modes, GATED=q is not None, HAS_D=D is not None, SEQUENCES=sequences,
            BLOCK_D=block_d, BLOCK_M=block_m, num_warps=warps_for(2 * block_d * block_m),
        )  # fmt: skip
    if own is not state:
        state.copy_(own)
    return y

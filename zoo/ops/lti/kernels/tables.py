"""Powers of the modes and taps of the kernel inside a chunk, made in float64 and rounded once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def table_kernel(
    log_a_ptr, c_ptr, skip_ptr,  # [D,M,2] [D,M,2] [D], float64
    power_ptr, taps_ptr, step_ptr,  # [D,2,M,CHUNK+1] [D,CHUNK] [D,4,M], float32
    M: tl.constexpr, LAG: tl.constexpr, HAS_SKIP: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program owns a channel: e^{l log_a} at lags 0 .. CHUNK, taps at 0 .. CHUNK - 1, the step over a chunk."""
    channel = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    lag = tl.arange(0, CHUNK)
    in_modes = m < M
    at = channel * M + m
    rate = tl.load(log_a_ptr + at * 2, mask=in_modes, other=0.0)
    turn = tl.load(log_a_ptr + at * 2 + 1, mask=in_modes, other=0.0)
    c_re = 2.0 * tl.load(c_ptr + at * 2, mask=in_modes, other=0.0)
    c_im = 2.0 * tl.load(c_ptr + at * 2 + 1, mask=in_modes, other=0.0)

    lags = lag.to(tl.float64)[None, :]
    size = tl.exp(rate[:, None] * lags)  # [BLOCK_M, CHUNK]
    angle = turn[:, None] * lags
    re = size * tl.cos(angle)
    im = size * tl.sin(angle)
    power = power_ptr + (channel * 2 * M + m)[:, None] * (CHUNK + 1) + lag[None, :]
    tl.store(power, re.to(tl.float32), mask=in_modes[:, None])
    tl.store(power + M * (CHUNK + 1), im.to(tl.float32), mask=in_modes[:, None])

    taps = tl.sum(c_re[:, None] * re - c_im[:, None] * im, axis=0)
    if HAS_SKIP and LAG == 0:
        taps += tl.where(lag == 0, tl.load(skip_ptr + channel), 0.0)
    tl.store(taps_ptr + channel * CHUNK + lag + LAG, taps.to(tl.float32), mask=lag + LAG < CHUNK)
    if LAG == 1:
        first = tl.zeros([CHUNK], tl.float32)
        if HAS_SKIP:
            first += tl.load(skip_ptr + channel).to(tl.float32)
        tl.store(taps_ptr + channel * CHUNK + lag, first, mask=lag == 0)

    size = tl.exp(rate * CHUNK)
    re = size * tl.cos(turn * CHUNK)
    im = size * tl.sin(turn * CHUNK)
    rounded_re = re.to(tl.float32)
    rounded_im = im.to(tl.float32)
    last = power_ptr + (channel * 2 * M + m) * (CHUNK + 1) + CHUNK
    tl.store(last, rounded_re, mask=in_modes)
    tl.store(last + M * (CHUNK + 1), rounded_im, mask=in_modes)
    step = step_ptr + channel * 4 * M + m
    tl.store(step, rounded_re, mask=in_modes)
    tl.store(step + M, rounded_im, mask=in_modes)
    tl.store(step + 2 * M, (re - rounded_re.to(tl.float64)).to(tl.float32), mask=in_modes)
    tl.store(step + 3 * M, (im - rounded_im.to(tl.float64)).to(tl.float32), mask=in_modes)

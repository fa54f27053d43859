"""Powers of the modes and taps of the kernel inside a chunk, made in float64 and rounded once; and their transposes."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.lti.kernels.phases import exponential


@triton.jit
def _powers(rate, turn, COUNT: tl.constexpr, FINE: tl.constexpr, BLOCK_M: tl.constexpr):
    """e^{l log_a} [COUNT, BLOCK_M] in float64: products of COUNT / FINE coarse and FINE fine powers.

    An exponential, a sine and a cosine in float64 take about fifty times as long as a product.
    """
    COARSE: tl.constexpr = COUNT // FINE
    few = tl.arange(0, FINE).to(tl.float64)[:, None]
    far = (tl.arange(0, COARSE) * FINE).to(tl.float64)[:, None]
    lo_re, lo_im = exponential(rate[None, :], turn[None, :], few)
    hi_re, hi_im = exponential(rate[None, :], turn[None, :], far)
    re = hi_re[:, None, :] * lo_re[None, :, :] - hi_im[:, None, :] * lo_im[None, :, :]
    im = hi_re[:, None, :] * lo_im[None, :, :] + hi_im[:, None, :] * lo_re[None, :, :]
    return tl.reshape(re, [COUNT, BLOCK_M]), tl.reshape(im, [COUNT, BLOCK_M])


@triton.jit
def _load_modes(ptr, at, mask):
    """Real and imaginary parts of numbers `at` of [...,2], in float64."""
    re = tl.load(ptr + at * 2, mask=mask, other=0.0).to(tl.float64)
    return re, tl.load(ptr + at * 2 + 1, mask=mask, other=0.0).to(tl.float64)


@launched
def table_kernel(
    log_a_ptr, c_ptr, skip_ptr,  # [D,M,2] [D,M,2] [D]
    power_ptr, taps_ptr, step_ptr,  # [D,2,CHUNK+1,M] [D,CHUNK] [D,4,M], float32
    M: tl.constexpr, LAG: tl.constexpr, HAS_SKIP: tl.constexpr,
    CHUNK: tl.constexpr, FINE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program owns a channel: e^{l log_a} at lags 0 .. CHUNK, taps at 0 .. CHUNK - 1, the step over a chunk."""
    channel = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    lag = tl.arange(0, CHUNK)
    in_modes = m < M
    rate, turn = _load_modes(log_a_ptr, channel * M + m, in_modes)
    c_re, c_im = _load_modes(c_ptr, channel * M + m, in_modes)

    re, im = _powers(rate, turn, CHUNK, FINE, BLOCK_M)
    power = power_ptr + channel * 2 * (CHUNK + 1) * M + lag[:, None] * M + m[None, :]
    tl.store(power, re.to(tl.float32), mask=in_modes[None, :])
    tl.store(power + M * (CHUNK + 1), im.to(tl.float32), mask=in_modes[None, :])

    taps = 2.0 * tl.sum(c_re[None, :] * re - c_im[None, :] * im, axis=1)
    if HAS_SKIP and LAG == 0:
        taps += tl.where(lag == 0, tl.load(skip_ptr + channel).to(tl.float64), 0.0)
    tl.store(taps_ptr + channel * CHUNK + lag + LAG, taps.to(tl.float32), mask=lag + LAG < CHUNK)
    if LAG == 1:
        first = tl.zeros([CHUNK], tl.float32)
        if HAS_SKIP:
            first += tl.load(skip_ptr + channel).to(tl.float32)
        tl.store(taps_ptr + channel * CHUNK + lag, first, mask=lag == 0)

    re, im = exponential(rate, turn, CHUNK)
    rounded_re = re.to(tl.float32)
    rounded_im = im.to(tl.float32)
    last = power_ptr + (channel * 2 * (CHUNK + 1) + CHUNK) * M + m
    tl.store(last, rounded_re, mask=in_modes)
    tl.store(last + M * (CHUNK + 1), rounded_im, mask=in_modes)
    step = step_ptr + channel * 4 * M + m
    tl.store(step, rounded_re, mask=in_modes)
    tl.store(step + M, rounded_im, mask=in_modes)
    tl.store(step + 2 * M, (re - rounded_re.to(tl.float64)).to(tl.float32), mask=in_modes)
    tl.store(step + 3 * M, (im - rounded_im.to(tl.float64)).to(tl.float32), mask=in_modes)


@launched(do_not_specialize=["blocks", "sequences"])
def mode_gradient_kernel(
    log_a_ptr, c_ptr,  # [D,M,2]
    dtaps_ptr, sums_ptr,  # [blocks,D,CHUNK] and [blocks,4,D,M] float32, of shared_gradient_kernel
    dlast_ptr, slope_ptr,  # [S,2,D,M] float32: gradient of the last state, its derivative in log_a
    other_ptr,  # [D,M,2] float64: what the kernel ahead adds to the gradient of log_a
    dlog_a_ptr, dc_ptr, dskip_ptr,  # [D,M,2] [D,M,2] [D]
    blocks, sequences,
    D: tl.constexpr, M: tl.constexpr, LAG: tl.constexpr,
    HAS_LAST: tl.constexpr, HAS_OTHER: tl.constexpr, HAS_SKIP: tl.constexpr,
    CHUNK: tl.constexpr, FINE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program owns a channel: gradients of log_a, c and the skip, summed in float64 in a fixed order.

    K_l = 2 Re sum c e^{l log_a}, so with U = sum_l dK_l e^{l log_a} and V = sum_l l dK_l e^{l log_a}, plus what the
    chunks gave each other, dc = 2 conj(U) and dlog_a = 2 conj(c V).
    """
    channel = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    lag = tl.arange(0, CHUNK)
    in_modes = m < M
    at = channel * M + m
    rate, turn = _load_modes(log_a_ptr, at, in_modes)
    c_re, c_im = _load_modes(c_ptr, at, in_modes)
    dkernel = tl.zeros([CHUNK], tl.float64)
    dskip = tl.zeros([CHUNK], tl.float64)
    u_re = tl.zeros([BLOCK_M], tl.float64)
    u_im = tl.zeros([BLOCK_M], tl.float64)
    v_re = tl.zeros([BLOCK_M], tl.float64)
    v_im = tl.zeros([BLOCK_M], tl.float64)
    for block in range(0, blocks):
        taps = dtaps_ptr + (block * D + channel) * CHUNK + lag
        dkernel += tl.load(taps + LAG, mask=lag + LAG < CHUNK, other=0.0)
        dskip += tl.load(taps, mask=lag == 0, other=0.0)
        sums = sums_ptr + (block * 4 * D + channel) * M + m
        u_re += tl.load(sums, mask=in_modes, other=0.0)
        u_im += tl.load(sums + D * M, mask=in_modes, other=0.0)
        v_re += tl.load(sums + 2 * D * M, mask=in_modes, other=0.0)
        v_im += tl.load(sums + 3 * D * M, mask=in_modes, other=0.0)

    re, im = _powers(rate, turn, CHUNK, FINE, BLOCK_M)
    u_re += tl.sum(dkernel[:, None] * re, axis=0)
    u_im += tl.sum(dkernel[:, None] * im, axis=0)
    late = (dkernel * lag)[:, None]
    v_re += tl.sum(late * re, axis=0)
    v_im += tl.sum(late * im, axis=0)
    a_re = 2.0 * (c_re * v_re - c_im * v_im)
    a_im = -2.0 * (c_re * v_im + c_im * v_re)
    if HAS_LAST:
        for sequence in range(0, sequences):
            place = (sequence * 2 * D + channel) * M + m
            g_re = tl.load(dlast_ptr + place, mask=in_modes, other=0.0).to(tl.float64)
            g_im = tl.load(dlast_ptr + place + D * M, mask=in_modes, other=0.0).to(tl.float64)
            w_re = tl.load(slope_ptr + place, mask=in_modes, other=0.0).to(tl.float64)
            w_im = tl.load(slope_ptr + place + D * M, mask=in_modes, other=0.0).to(tl.float64)
            a_re += g_re * w_re + g_im * w_im
            a_im += g_im * w_re - g_re * w_im
    if HAS_OTHER:
        other_re, other_im = _load_modes(other_ptr, at, in_modes)
        a_re += other_re
        a_im += other_im
    tl.store(dlog_a_ptr + at * 2, a_re.to(dlog_a_ptr.dtype.element_ty), mask=in_modes)
    tl.store(dlog_a_ptr + at * 2 + 1, a_im.to(dlog_a_ptr.dtype.element_ty), mask=in_modes)
    tl.store(dc_ptr + at * 2, (2.0 * u_re).to(dc_ptr.dtype.element_ty), mask=in_modes)
    tl.store(dc_ptr + at * 2 + 1, (-2.0 * u_im).to(dc_ptr.dtype.element_ty), mask=in_modes)
    if HAS_SKIP:
        tl.store(dskip_ptr + channel, tl.sum(dskip, axis=0).to(dskip_ptr.dtype.element_ty))

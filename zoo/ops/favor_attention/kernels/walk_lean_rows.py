"""Token by token, around the lean walks: what stands beside a token, and sums over parts of the features."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.favor_attention.kernels.walk_lean import LANES, three
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import LOG2E

MOST = tl.constexpr(1e38)  # what is taken from a logarithm at most, in either direction: features of 0, but a number


@triton.jit
def store_beside(ptr, below, delta, row, in_rows, HAS_DELTA: tl.constexpr):
    """Three parts of -below for every row, then 1 three times, then three parts of -delta, or again 1."""
    lane = tl.arange(0, LANES)[None, :]
    below = tl.where(below > MOST, MOST, tl.where(below < -MOST, -MOST, below))  # what is no number stays none
    hi, mid, lo = three(-below)
    parts = tl.where(lane == 0, hi[:, None], tl.where(lane == 1, mid[:, None], lo[:, None]))
    parts = tl.where(lane < 3, parts, tl.where(lane < 9, 1.0, 0.0))
    if HAS_DELTA:
        hi, mid, lo = three(-delta)
        deltas = tl.where(lane == 6, hi[:, None], tl.where(lane == 7, mid[:, None], lo[:, None]))
        parts = tl.where((lane > 5) & (lane < 9), deltas, parts)
    tl.store(ptr + row[:, None] * LANES + lane, parts.to(tl.bfloat16), mask=in_rows[:, None])


@launched(do_not_specialize=["rows"])
def beside_keys_kernel(
    k_ptr, beside_ptr,  # [BT,G,N], [BT,G,LANES] bfloat16
    rows, scale, stride_t, stride_h, G: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS rows of [BT,G], from which |k|^2 scale is to be taken."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    at = row // G * stride_t + row % G * stride_h
    k = tl.load(k_ptr + at[:, None] + tl.arange(0, N)[None, :], mask=in_rows[:, None], other=0.0).to(tl.float32)
    below = tl.sum(k * k, axis=1) * scale
    store_beside(beside_ptr, below, below, row, in_rows, False)


@launched(do_not_specialize=["rows"])
def beside_queries_kernel(
    dy_ptr, y_ptr, dlog_ptr, log_total_ptr,  # [BTH,P], [BTH,P], [BTH] float32, [BTH] float32, all contiguous
    delta_ptr, beside_ptr,  # [BTH] float32, [BTH,LANES] bfloat16
    rows, P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS rows: <dy, y> less the logarithm's cotangent, and the logarithm that is to be taken."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    at = row[:, None] * P + tl.arange(0, P)[None, :]
    dy = tl.load(dy_ptr + at, mask=in_rows[:, None], other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=in_rows[:, None], other=0.0).to(tl.float32)
    dlog = tl.load(dlog_ptr + row, mask=in_rows, other=0.0)
    delta = tl.sum(dy * y, axis=1) - dlog
    tl.store(delta_ptr + row, delta, mask=in_rows)
    store_beside(beside_ptr, tl.load(log_total_ptr + row, mask=in_rows, other=0.0) * LOG2E, delta, row, in_rows, True)


@launched(do_not_specialize=["rows"])
def gather_kernel(
    part_ptr, felt_ptr, x_ptr, out_ptr,  # [parts,BTH,N], [parts,BTH] float32, [BT,G,N], [BTH,N]
    rows, parts, scale, stride_t, stride_h,
    H: tl.constexpr, J: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, HAS_FELT: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS rows: their sum over parts, less x times the sum of `felt` and scale if HAS_FELT."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, N)
    in_rows = row < rows
    total = tl.zeros([ROWS, N], tl.float32)
    felt = tl.zeros([ROWS], tl.float32)
    at = row
    for _ in range(0, parts):
        part = tl.load(part_ptr + at[:, None] * N + n[None, :], mask=in_rows[:, None], other=0.0)
        total += part.to(tl.float32)
        if HAS_FELT:
            felt += tl.load(felt_ptr + at, mask=in_rows, other=0.0)
        at += rows
    if HAS_FELT:
        x_at = row // H * stride_t + row % H // J * stride_h
        x = tl.load(x_ptr + x_at[:, None] + n[None, :], mask=in_rows[:, None], other=0.0)
        total -= x.to(tl.float32) * (felt * scale)[:, None]
    tl.store(out_ptr + row[:, None] * N + n[None, :], total.to(out_ptr.dtype.element_ty), mask=in_rows[:, None])

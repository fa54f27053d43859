"""Row by row: putting slices of features together, and the products <dy, y>."""

from __future__ import annotations

import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import exp


@launched(do_not_specialize=["rows"])
def combine_kernel(
    part_ptr, part_log_ptr, out_ptr, log_total_ptr,  # [slices,BTH,P], [slices,BTH] float32, [BTH,P], [BTH] float32
    rows, slices, P: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS rows: means over each slice's features become means over all."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    p = tl.arange(0, BLOCK_P)
    in_rows = row < rows
    mask = in_rows[:, None] & (p < P)[None, :]
    highest = tl.load(part_log_ptr + row, mask=in_rows, other=0.0)
    at = row
    for _ in range(1, slices):
        at += rows
        highest = tl.maximum(highest, tl.load(part_log_ptr + at, mask=in_rows, other=0.0))
    seen = highest > float("-inf")
    highest = tl.where(seen, highest, 0.0)
    out = tl.zeros([ROWS, BLOCK_P], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    at = row
    for _ in range(0, slices):
        weight = exp(tl.load(part_log_ptr + at, mask=in_rows, other=0.0) - highest)
        each = tl.load(part_ptr + at[:, None] * P + p[None, :], mask=mask, other=0.0)
        out += each.to(tl.float32) * weight[:, None]
        total += weight
        at += rows
    total = tl.where(seen, total, 1.0)
    out = out / total[:, None]
    tl.store(out_ptr + row[:, None] * P + p[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(log_total_ptr + row, tl.where(seen, highest + tl.log(total), float("inf")), mask=in_rows)


@launched(do_not_specialize=["rows"])
def delta_kernel(
    dy_ptr, y_ptr, dlog_ptr, delta_ptr,  # [BTH,P], [BTH,P], [BTH] float32, [BTH] float32, all contiguous
    rows, P: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS rows: <dy, y> less the cotangent of the logarithm of the sum of weights."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    p = tl.arange(0, BLOCK_P)
    in_rows = row < rows
    mask = in_rows[:, None] & (p < P)[None, :]
    dy = tl.load(dy_ptr + row[:, None] * P + p[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row[:, None] * P + p[None, :], mask=mask, other=0.0).to(tl.float32)
    dlog = tl.load(dlog_ptr + row, mask=in_rows, other=0.0)
    tl.store(delta_ptr + row, tl.sum(dy * y, axis=1) - dlog, mask=in_rows)


@launched(do_not_specialize=["rows"])
def half_square_kernel(
    x_ptr, half_ptr,  # [BT,G,N], [BT,G] float32
    rows, scale, stride_t, stride_h, G: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns ROWS rows of [BT,G]: |x|^2 scale."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK_N)
    in_rows = row < rows
    at = row // G * stride_t + row % G * stride_h
    x = tl.load(x_ptr + at[:, None] + n[None, :], mask=in_rows[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
    tl.store(half_ptr + row, tl.sum(x * x, axis=1) * scale, mask=in_rows)

"""Backward of the gated RMS norm; the statistics are computed again, not stored.

With n the normalised value and g its gradient, the gradient of what was normalised is (g - n mean(g n)) / rms. In a
group of one channel the difference is all cancellation: there 1 - n^2 = eps / rms^2, which is computed instead. The
weight's sums over rows are kept per program and added up afterwards, so that every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import sigmoid
from zoo.ops.kernels.rows import cdiv
from zoo.ops.norm.kernels.rows import as_rows, block_of

PROGRAMS = 264  # row ranges, times the groups: two per multiprocessor of an H100 or H200
WARPS: int | None = None  # of a program; None for those of the forward, twice as many for wide groups
WIDE = 4096  # channels


@launched
def _norm_bwd(
    dy_ptr, x_ptr, z_ptr, weight_ptr,  # [R,D] [R,D] [R,D] [D]
    dx_ptr, dz_ptr, partial_ptr,  # -> [R,D], [R,D], [row ranges,D]
    R, rows_per_program, groups, D, GROUP, eps, dy_stride_r, x_stride_r, z_stride_r, dz_stride_r,
    HAS_GATE: tl.constexpr, NORM_FIRST: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns one group of channels of a range of rows, and their share of the gradient of the weight."""
    part = (tl.program_id(0) // groups).to(tl.int64)
    c = tl.arange(0, BLOCK)
    d = (tl.program_id(0) % groups) * GROUP + c
    in_group = c < GROUP
    weight = tl.load(weight_ptr + d, mask=in_group, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    first = part * rows_per_program  # int64, and so is every row
    last = tl.minimum(first + rows_per_program, R)
    next_x = tl.load(x_ptr + first * x_stride_r + d, mask=in_group, other=0.0)
    next_dy = tl.load(dy_ptr + first * dy_stride_r + d, mask=in_group, other=0.0)
    next_z = next_x
    if HAS_GATE:
        next_z = tl.load(z_ptr + first * z_stride_r + d, mask=in_group, other=0.0)
    for row in range(first, last):
        x, dy, z = next_x.to(tl.float32), next_dy.to(tl.float32), next_z.to(tl.float32)
        live = in_group & (c * 0 + row + 1 < last)  # the next row is on its way while this one is worked on
        next_x = tl.load(x_ptr + (row + 1) * x_stride_r + d, mask=live, other=0.0)
        next_dy = tl.load(dy_ptr + (row + 1) * dy_stride_r + d, mask=live, other=0.0)
        if HAS_GATE:
            next_z = tl.load(z_ptr + (row + 1) * z_stride_r + d, mask=live, other=0.0)
        value = x
        share, gate = x, x
        if HAS_GATE:
            share = sigmoid(z, x_ptr.dtype.element_ty == tl.float32)
            gate = z * share
            if not NORM_FIRST:
                value = x * gate
        scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, axis=0) / GROUP + eps))
        normal = value * scale
        dgate = dy * weight * normal  # used where the gate comes last
        if HAS_GATE and NORM_FIRST:
            dy = dy * gate
        dweight += dy * normal
        g = dy * weight
        if SINGLE:
            dvalue = g * (eps * scale * scale) * scale
        else:
            dvalue = (g - normal * (tl.sum(g * normal, axis=0) / GROUP)) * scale
        if HAS_GATE:
            if not NORM_FIRST:
                dgate = dvalue * x
                dvalue = dvalue * gate
            dz = dgate * share * (1.0 + z * (1.0 - share))
            tl.store(dz_ptr + row * dz_stride_r + d, dz.to(dz_ptr.dtype.element_ty), mask=in_group)
        tl.store(dx_ptr + row * D + d, dvalue.to(dx_ptr.dtype.element_ty), mask=in_group)
    tl.store(partial_ptr + part * D + d, dweight, mask=in_group)


def norm_backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool,
    dz: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernel; arguments and results as those of the custom operator.

    dz: where the gradient of z goes, [...,D] with one stride from row to row; None for a tensor of its own.
    """
    channels = x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dz is None:
        dz = x.new_empty(0) if z is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cotangents, values = as_rows(dy), as_rows(x)
    gates = values if z is None else as_rows(z)
    rows, groups = values.shape[0], channels // group_size
    rows_per_program = cdiv(rows, PROGRAMS)
    parts = cdiv(rows, rows_per_program)
    partial = torch.empty((parts, channels), dtype=torch.float32, device=x.device)
    block, warps = block_of(group_size)
    warps = WARPS or (2 * warps if block >= WIDE else warps)
    _norm_bwd[(parts * groups,)](
        cotangents, values, gates, weight.contiguous(), dx, dz, partial,
        rows, rows_per_program, groups, channels, group_size, eps,
        cotangents.stride(0), values.stride(0), gates.stride(0), dz.stride(-2) if dz.dim() > 1 else channels,
        HAS_GATE=z is not None, NORM_FIRST=norm_before_gate, SINGLE=group_size == 1, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return dx, dz, partial.sum(0).to(weight.dtype)

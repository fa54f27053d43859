"""Forward of the gated RMS norm: one read, one write."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import sigmoid
from zoo.ops.norm.kernels.rows import as_rows, block_of


@launched
def _norm_fwd(
    x_ptr, z_ptr, weight_ptr, y_ptr,  # [R,D] [R,D] [D] -> [R,D]
    groups, D, GROUP, eps, x_stride_r, z_stride_r,
    HAS_GATE: tl.constexpr, NORM_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns one group of channels of one row."""
    row = (tl.program_id(0) // groups).to(tl.int64)
    c = tl.arange(0, BLOCK)
    d = (tl.program_id(0) % groups) * GROUP + c
    in_group = c < GROUP
    value = tl.load(x_ptr + row * x_stride_r + d, mask=in_group, other=0.0).to(tl.float32)
    gate = value
    if HAS_GATE:
        z = tl.load(z_ptr + row * z_stride_r + d, mask=in_group, other=0.0).to(tl.float32)
        gate = z * sigmoid(z, x_ptr.dtype.element_ty == tl.float32)
        if not NORM_FIRST:
            value = value * gate
    value = value * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, axis=0) / GROUP + eps))
    value = value * tl.load(weight_ptr + d, mask=in_group, other=0.0).to(tl.float32)
    if HAS_GATE and NORM_FIRST:
        value = value * gate
    tl.store(y_ptr + row * D + d, value.to(y_ptr.dtype.element_ty), mask=in_group)


def norm_forward(
    x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """Launch the kernel; arguments and result as those of the custom operator."""
    channels = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    values = as_rows(x)
    gates = values if z is None else as_rows(z)
    groups = channels // group_size
    block, warps = block_of(group_size)
    _norm_fwd[(values.shape[0] * groups,)](
        values, gates, weight.contiguous(), y, groups, channels, group_size, eps, values.stride(0), gates.stride(0),
        HAS_GATE=z is not None, NORM_FIRST=norm_before_gate, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return y

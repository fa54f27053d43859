"""One token of the short convolution in place: the state is read once, and written back one place to the left."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import LOG2E
from zoo.ops.kernels.rows import cdiv, next_power_of_2, rows, warps_for

TILE = 2048  # elements of the state that one program holds, 16 in each of 128 threads


@launched
def short_convolution_step_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr,  # [B,D] [D,PAST+1] [D] [B,D,PAST] -> [B,D]
    D, x_stride_b, state_stride_b, state_stride_d,
    PAST: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program owns the states [BLOCK_D, PAST] of a block of channels of one sequence, PAST = W - 1."""
    blocks = tl.cdiv(D, BLOCK_D)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    w = tl.arange(0, BLOCK_W)
    in_d = d < D
    in_past = in_d[:, None] & (w < PAST)[None, :]
    row = state_ptr + b * state_stride_b + d.to(tl.int64) * state_stride_d
    tile = row[:, None] + w[None, :]
    taps = weight_ptr + d.to(tl.int64) * (PAST + 1)
    oldest = tl.load(row, mask=in_d, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * x_stride_b + d, mask=in_d, other=0.0)
    kept = tl.load(tile + 1, mask=in_d[:, None] & (w < PAST - 1)[None, :], other=0.0)  # [BLOCK_D, BLOCK_W]
    after = tl.where((w == PAST - 1)[None, :], x[:, None].to(kept.dtype), kept)
    weight = tl.load(taps[:, None] + 1 + w[None, :], mask=in_past, other=0.0).to(tl.float32)
    y = tl.sum(after.to(tl.float32) * weight, axis=1)
    y += oldest * tl.load(taps, mask=in_d, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    if SILU:
        y = y / (1.0 + tl.exp2(-y * LOG2E))
    tl.debug_barrier()  # what a thread writes, its neighbour has read
    tl.store(tile, after, mask=in_past)
    tl.store(y_ptr + b * D + d, y.to(y_ptr.dtype.element_ty), mask=in_d)


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor) -> Tensor:
    """Arguments and result as those of the custom operator."""
    batch, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x, own = rows(x), rows(state)
    block_w: int = next_power_of_2(state.shape[2])
    block_d = min(next_power_of_2(channels), max(1, TILE // block_w))
    with on_device(x):
        short_convolution_step_kernel[(batch * cdiv(channels, block_d),)](
            x, weight.contiguous(), x if bias is None else bias.contiguous(), own, y,
            channels, x.stride(0), own.stride(0), own.stride(1),
            PAST=state.shape[2], HAS_BIAS=bias is not None, SILU=silu, BLOCK_D=block_d, BLOCK_W=block_w,
            num_warps=warps_for(block_d * block_w),
        )  # fmt: skip
    if own is not state:
        state.copy_(own)
    return y

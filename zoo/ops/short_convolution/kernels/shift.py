"""Taps of a shift state space, from its parameters in one kernel: what a decode step needs before it convolves."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.rows import cdiv, next_power_of_2

TILE = 512  # taps of a program


@launched
def shift_taps_kernel(
    B_ptr, C_ptr, skip_ptr, taps_ptr,  # [D,W] [D,W] [D] -> [D,W]
    D, W: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program owns the taps of BLOCK_D channels: K_j = sum_m B_m C_{m+j} (+ D at j = 0), the last one first."""
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_W)
    in_d = d < D
    skip = tl.load(skip_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    taps = tl.where(j[None, :] == 0, skip[:, None], 0.0)  # [BLOCK_D, BLOCK_W]
    for m in range(0, W):
        b = tl.load(B_ptr + d * W + m, mask=in_d, other=0.0).to(tl.float32)
        seen = in_d[:, None] & (j < W - m)[None, :]
        taps += b[:, None] * tl.load(C_ptr + d[:, None] * W + (m + j)[None, :], mask=seen, other=0.0).to(tl.float32)
    tl.store(taps_ptr + d[:, None] * W + (W - 1 - j)[None, :], taps, mask=in_d[:, None] & (j < W)[None, :])


def launch(B: Tensor, C: Tensor, skip: Tensor) -> Tensor:
    """Arguments and result as those of the custom operator."""
    channels, width = B.shape
    taps = torch.empty(B.shape, dtype=torch.float32, device=B.device)
    block_w = max(2, next_power_of_2(width))
    block_d = max(1, TILE // block_w)
    with on_device(B):
        shift_taps_kernel[(cdiv(channels, block_d),)](
            B.contiguous(), C.contiguous(), skip.contiguous(), taps, channels,
            W=width, BLOCK_D=block_d, BLOCK_W=block_w, num_warps=4,
        )  # fmt: skip
    return taps

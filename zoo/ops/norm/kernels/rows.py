"""Rows as the kernels of the gated RMS norm see them: [...,D] as [R,D], a block that covers one group."""

from __future__ import annotations

from torch import Tensor

from zoo.ops.kernels.rows import next_power_of_2


def as_rows(x: Tensor) -> Tensor:
    """x [...,D] as [R,D] with stride 1 along D; copied only if no such view exists."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def block_of(group: int) -> tuple[int, int]:
    """Block size that covers a group, and the number of warps for it."""
    block = max(16, next_power_of_2(group))
    return block, 1 if block <= 512 else min(16, block // 512)

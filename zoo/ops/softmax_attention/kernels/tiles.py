"""Which tile of which sequence each program owns, and how large tiles are."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.kernels.rows import next_power_of_2, rows
from zoo.ops.kernels.widths import whole_width


def tiles_of(lengths: Tensor, total: int, block: int) -> tuple[Tensor, int]:
    """Table int64 [2,M] of (sequence, tile within it) for M programs, and M.

    lengths: int64 [S]. total: upper bound of their sum. Programs left over have sequence S. M does not depend on
    values, so nothing waits for the device.
    """
    programs = total // block + lengths.shape[0]
    tiles = (lengths + block - 1) // block
    ends = tiles.cumsum(0)
    program = torch.arange(programs, device=lengths.device)
    sequence = torch.searchsorted(ends, program, right=True)
    first = torch.cat([ends - tiles, ends[-1:]])
    return torch.stack([sequence, program - first[sequence]]), programs


def widths(channels: int) -> int:
    """Width of a tile that holds `channels`: a power of two, at least 16."""
    return max(16, next_power_of_2(channels))


def wide_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its last axis is not contiguous or, in half precision, no multiple of 16."""
    return rows(whole_width(tensor))


def strides(tensor: Tensor, packed: bool) -> tuple[int, int, int]:
    """Strides of batch (0 when sequences are packed into one row), token and head of [B,T,H,P]."""
    return (0 if packed else tensor.stride(0)), tensor.stride(1), tensor.stride(2)

"""What launchers settle before kernels run: layouts, sizes of grids and tiles, and how many warps work on a tile."""

from __future__ import annotations

from torch import Tensor


def rows(part: Tensor) -> Tensor:
    """`part` with stride 1 along its last axis; copied if it has another."""
    return part if part.stride(-1) == 1 else part.contiguous()


def warps_for(elements: int) -> int:
    """Warps of a program that overwrites a tile of so many elements, a power of 2: at most 4, and so few that no
    element is held by two warps, one of which could read what the other has written."""
    return max(1, min(4, elements // 32))


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`. Triton's own serves kernels too, and takes a microsecond or more of every launch."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The least power of 2 that is not below `size`, for size >= 1."""
    return 1 << (size - 1).bit_length()

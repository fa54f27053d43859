"""What launchers settle before kernels run: layouts, and how many warps work on a tile."""

from __future__ import annotations

from torch import Tensor


def rows(part: Tensor) -> Tensor:
    """`part` with stride 1 along its last axis; copied if it has another."""
    return part if part.stride(-1) == 1 else part.contiguous()


def warps_for(elements: int) -> int:
    """Warps of a program that overwrites a tile of so many elements, a power of 2: at most 4, and so few that no
    element is held by two warps, one of which could read what the other has written."""
    return max(1, min(4, elements // 32))

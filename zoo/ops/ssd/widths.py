"""Which widths the kernels of SSD that work from chunk borders take; free of Triton, so that a mixer can ask."""

from __future__ import annotations

WIDTHS, P_MOST, N_MOST = (16, 32, 64, 128), 64, 128  # P and N of one launch, and what wider ones are cut into


def served(channels: int, modes: int, heads: int, groups: int) -> bool:
    """Whether heads of P channels and N modes are served. heads, groups: H and G."""
    if heads // groups % 2 == 1 and channels < 32 < modes:
        return False  # a program works on one head then, and its y was wrong on an H100 (Triton 3.6)
    return (channels in WIDTHS or channels % P_MOST == 0) and (modes in WIDTHS or modes % N_MOST == 0)

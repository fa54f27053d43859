"""Which widths the kernels of SSD that work from chunk borders take; free of Triton, so that a mixer can ask."""

from __future__ import annotations

P_MOST = 64  # channels that wider heads are cut into
N_MOST = 128  # modes of one program
CHANNELS, MODES = (16, 32, 64, 128), (16, 32, 64, N_MOST, 2 * N_MOST)


def fits(channels: int, modes: int) -> bool:
    """Whether programs hold the tiles of whole heads."""
    return channels in CHANNELS and channels * min(modes, N_MOST) <= P_MOST * N_MOST


def served(channels: int, modes: int, heads: int, groups: int) -> bool:
    """Whether heads of P channels and N modes are served. heads, groups: H and G."""
    alone = heads // groups % 2 == 1  # a program works on one head: its narrow tiles were wrong on an H100 (Triton 3.6)
    if alone and (channels < 32 < modes or channels == 32 < N_MOST <= modes):
        return False
    return (channels in CHANNELS or channels % P_MOST == 0) and modes in MODES

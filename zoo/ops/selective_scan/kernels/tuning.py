"""Block sizes of the selective scan's kernels, and where to cut sequences; nothing is searched."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from zoo.ops.selective_scan import triton_path

LANES = 32  # every program is one warp
FEW = 528  # programs: one for each of the 4 schedulers of 132 multiprocessors
MANY = 2112  # programs that hide the time of reads behind each other
SHORTEST_SEGMENT = 256  # tokens; cutting computes every exponential twice, and is not worth less


@dataclass(frozen=True)
class Blocks:
    """Sizes of tiles [n states, e channels]. tile: tokens that the scan reads together; back_tile: the backward."""

    n: int
    e: int
    tile: int
    back_tile: int


def blocks_for(state: int) -> Blocks:
    """Tiles for N states of a channel: 16 elements of the state in a lane while that is possible.

    A backward program holds decays and states of `back_tile` tokens in registers, 64 elements of each in a lane.
    """
    n = max(4, int(triton.next_power_of_2(state)))
    e = max(8, min(LANES, 512 // n))
    return Blocks(n, e, 8 if n <= 64 else 4, max(1, min(8, 64 * LANES // (n * max(e, 16)))))


def segment_length(rows: int, tokens: int, channel_blocks: int) -> int:
    """Tokens of a segment, a multiple of CHUNK, so that rows * segments * channel_blocks programs fill the device."""
    whole = triton.cdiv(tokens, triton_path.CHUNK) * triton_path.CHUNK
    programs = rows * channel_blocks
    if programs >= FEW:
        return int(whole)
    length = triton.cdiv(tokens, triton.cdiv(MANY, programs))
    return int(min(whole, max(SHORTEST_SEGMENT, triton.cdiv(length, triton_path.CHUNK) * triton_path.CHUNK)))


def parts_of_group(rows: int, blocks: int) -> tuple[int, int]:
    """Parts that the channel blocks of a group fall into, and blocks of each part.

    rows: chunks times groups. A part keeps one share of dB and dC in memory, so parts are as few as fill the device.
    """
    parts = min(blocks, max(int(triton.cdiv(blocks, 16)), int(triton.cdiv(2 * MANY, max(1, rows)))))
    loops = int(triton.cdiv(blocks, parts))
    return int(triton.cdiv(blocks, loops)), loops

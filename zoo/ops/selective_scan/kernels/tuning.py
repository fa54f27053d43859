"""Block sizes of the selective scan's kernels, and where to cut sequences; nothing is searched."""

from __future__ import annotations

from dataclasses import dataclass, replace

from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.selective_scan import triton_path

LANES = 32
PROCESSORS = 132
SHARES = 64 << 20  # bytes for the shares of dB and dC, where the backward can take a sequence in slabs
SHORTEST_SEGMENT = 256  # tokens; cutting computes every exponential once more, and is not worth less


@dataclass(frozen=True)
class Blocks:
    """Sizes of a kernel: `tiles` tiles of [rows states, e channels] in a program of `warps`; tokens of a `tile`.

    resident: warps that a multiprocessor holds at the kernel's registers.
    touch: read keys and queries, and in the backward all of a token's values, ahead of their use.
    """

    tiles: int
    rows: int
    e: int
    tile: int
    warps: int
    resident: int
    touch: bool = False


# N up to: forward and summaries; backward. A lane holds 4 states of a tile's rows, and as many tiles as there are.
AHEAD = {
    16: Blocks(tiles=4, rows=4, e=32, tile=4, warps=1, resident=12, touch=True),
    32: Blocks(tiles=8, rows=4, e=32, tile=4, warps=1, resident=12, touch=True),
    64: Blocks(tiles=8, rows=8, e=16, tile=4, warps=1, resident=11, touch=True),
    128: Blocks(tiles=8, rows=16, e=8, tile=2, warps=1, resident=14, touch=True),
    256: Blocks(tiles=8, rows=32, e=8, tile=2, warps=1, resident=8, touch=True),
}
BACK = {
    16: Blocks(tiles=1, rows=16, e=32, tile=2, warps=1, resident=8, touch=True),
    32: Blocks(tiles=1, rows=32, e=16, tile=2, warps=1, resident=8, touch=True),
    64: Blocks(tiles=1, rows=64, e=8, tile=2, warps=1, resident=8, touch=True),
    128: Blocks(tiles=1, rows=128, e=4, tile=2, warps=1, resident=8, touch=True),
    256: Blocks(tiles=1, rows=256, e=4, tile=2, warps=2, resident=8, touch=True),
}


def blocks_for(table: dict[int, Blocks], state: int) -> Blocks:
    """Sizes for N states of a channel from AHEAD or BACK; fewer states than a row of the table have fewer rows."""
    found = table[min(limit for limit in table if state <= limit)]
    padded = max(4, int(next_power_of_2(state)))
    while found.tiles * found.rows > padded:
        tiles, rows = (found.tiles // 2, found.rows) if found.tiles > 1 else (1, found.rows // 2)
        found = replace(found, tiles=tiles, rows=rows)
    return found


def segment_length(rows: int, tokens: int, programs: int, blocks: Blocks) -> int:
    """Tokens of a segment, a multiple of CHUNK, so that rows * segments * programs fill the device once.

    A sequence stays whole if its programs alone come to half of what the device holds.
    """
    whole = int(cdiv(tokens, triton_path.CHUNK)) * triton_path.CHUNK
    held = PROCESSORS * blocks.resident // blocks.warps
    if 2 * rows * programs > held:
        return whole
    length = cdiv(tokens, held // (rows * programs))
    return min(whole, max(SHORTEST_SEGMENT, int(cdiv(length, triton_path.CHUNK)) * triton_path.CHUNK))


def slab_length(segment: int, row: int) -> int:
    """Tokens of a slab of a segment, a multiple of CHUNK. row: bytes of shares for one token of every segment."""
    fit = SHARES // row // triton_path.CHUNK * triton_path.CHUNK
    return min(segment, max(SHORTEST_SEGMENT, triton_path.CHUNK, fit))

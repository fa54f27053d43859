"""How large the tiles of the products are. A product runs over N = B P columns, those of the whole batch at once."""

from __future__ import annotations

from typing import NamedTuple

from zoo.ops.kernels.rows import next_power_of_2


class Tiles(NamedTuple):
    """Rows and columns of a tile of the result, terms of the sum per step, warps and stages."""

    rows: int
    columns: int
    terms: int
    warps: int
    stages: int


def tiles_for(rows: int, columns: int, element_size: int) -> Tiles:
    """Tiles of a result [rows, columns]; small results get small tiles."""
    high = 64 if element_size == 4 else 128
    tall, wide = min(high, _edge(rows)), min(high, _edge(columns))
    if element_size == 4:
        return Tiles(tall, wide, 32, 4, 2)
    return Tiles(tall, wide, 64, 8 if tall * wide >= 128 * 128 else 4, 3)


def row_block(keys: int) -> int:
    """Entries of a row that are looked at together, for a program that owns a whole row."""
    return min(1024, max(32, next_power_of_2(keys)))


def _edge(size: int) -> int:
    """A power of two that holds `size`, at least 16, the least that a product takes."""
    return max(16, next_power_of_2(size))

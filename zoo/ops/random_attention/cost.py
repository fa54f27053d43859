"""What causality spares of the product with the weights, and what is left to count."""

from __future__ import annotations

from collections.abc import Iterator

LEAST_ROWS, MOST_BLOCKS = 256, 8  # a block of rows is a product of its own; up to 4 of the least save no time


def row_blocks(queries: int, keys: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """(first row, row behind the last, keys that any of them sees) of the blocks that are multiplied one by one.

    One block if not causal or if there are few rows; else at most MOST_BLOCKS, which leave 9/16 of a square.
    """
    rows = queries
    if causal and queries > 4 * LEAST_ROWS:
        rows = max(LEAST_ROWS, -(-queries // MOST_BLOCKS))
    for first in range(0, max(queries, 1), max(rows, 1)):
        end = min(first + rows, queries)
        yield first, end, min(keys, max(0, end + keys - queries)) if causal else keys


def flops(batch: int, queries: int, keys: int, heads: int, width: int, causal: bool = True) -> int:
    """Matrix-product FLOPs of the forward, 2 per multiply-add: 2 B H Tq Tk P without what causality spares."""
    pairs = sum((end - first) * seen for first, end, seen in row_blocks(queries, keys, causal))
    return 2 * batch * heads * pairs * width

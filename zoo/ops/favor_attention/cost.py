"""Matrix-product FLOPs of FAVOR+ attention."""

from __future__ import annotations

from zoo.ops.favor_attention.features import feature_count
from zoo.ops.semiseparable.chunked import BLOCK
from zoo.ops.semiseparable.cost import CHUNK
from zoo.ops.semiseparable.cost import flops as scan_flops


def flops(
    batch: int,
    tokens: int,
    heads: int,
    groups: int,
    width: int,
    channels: int,
    rows: int,
    *,
    features: str = "positive",
    causal: bool = True,
) -> int:
    """FLOPs of the plain path's forward, 2 per multiply-add, with M features and P' = P + 1.

    Features: 2 B T (H + G) R N for R rows of the projection. Then 4 B T H M P' if not causal; if causal as much for the
    states, and products inside chunks of K = 64 tokens, 2 B T H K (M + P'). Rows that `outgrown` serves cost more: they
    depend on the inputs and are not counted here.
    """
    count = feature_count(rows, features)
    mapped = 2 * batch * tokens * (heads + groups) * rows * width
    values = channels + 1
    if not causal:
        return mapped + 4 * batch * tokens * heads * count * values
    if tokens == 1:
        return mapped + 2 * batch * heads * count * values
    if features == "relu":
        chunks = -(-tokens // CHUNK)
        scanned = scan_flops(batch, chunks * min(CHUNK, tokens), heads, heads, count, values)
        return mapped + scanned + batch * heads * carried(chunks) * count * values
    length = min(CHUNK, tokens)
    chunks = -(-tokens // length)
    inside = 2 * length * length * (count + values)
    states = 4 * length * count * values
    mapped = mapped // tokens * chunks * length  # the last chunk is filled up
    return mapped + batch * heads * (chunks * (inside + states) + carried(chunks) * count * values)


def carried(chunks: int) -> int:
    """FLOPs to carry one number of the state over all chunks."""
    if chunks <= 2 * BLOCK:
        return 2 * chunks * chunks
    blocks = -(-chunks // BLOCK)
    return 2 * blocks * BLOCK * BLOCK + carried(blocks)

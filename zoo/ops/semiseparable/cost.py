"""Matrix-product FLOPs of the chunked semiseparable scan."""

from __future__ import annotations

CHUNK = 64


def flops(batch: int, tokens: int, heads: int, groups: int, state: int, channels: int, *, chunk: int = CHUNK) -> int:
    """FLOPs of the forward, 2 per multiply-add: 2 B T (K N G + K P H + 2 N P H) with K = min(chunk, T).

    One token (T = 1) is the plain recurrence, whose products are the outer product and the read-out.
    Source: Dao & Gu 2024, section 6.
    """
    span = min(chunk, tokens)
    per_token = span * state * groups + span * channels * heads if tokens > 1 else 0
    return 2 * batch * tokens * (per_token + 2 * state * channels * heads)


def backward_flops(
    batch: int, tokens: int, heads: int, groups: int, state: int, channels: int, *, chunk: int = CHUNK
) -> int:
    """FLOPs of the backward: scores again, four products inside a chunk, and five with a state."""
    span = min(chunk, tokens)
    inside = span * state * (groups + 2 * heads) + 2 * span * channels * heads
    return 2 * batch * tokens * (inside + 5 * state * channels * heads)

"""Matrix-product FLOPs of the Triton kernels of FAVOR+ attention, which compute features where they need them."""

from __future__ import annotations

from collections.abc import Sequence

CHUNK = 64


def forward_flops(q: Sequence[int], k: Sequence[int], channels: int, count: int, *, causal: bool) -> int:
    """Features and sums, 2 B H (T + K) M (N + P), and inside chunks 2 B T H 64 (M + P) if causal.

    q: sizes [B,T,H,N]. k: sizes [B,K,G,N]. channels: P. count: M.
    """
    batch, tokens, heads, width = q
    total = 2 * batch * heads * (tokens + k[1]) * count * (width + channels)
    return total + inside(batch, tokens, heads, count + channels) if causal else total


def backward_flops(q: Sequence[int], k: Sequence[int], channels: int, count: int, *, causal: bool) -> int:
    """Gradients of q, of k and of v, each with its features, states and readings."""
    batch, tokens, heads, width = q
    both = 2 * batch * heads * (tokens + k[1]) * count
    if not causal:  # two sums are one here; features of readers and writers, readings, products with the projection
        return both // 2 * (3 * width + 3 * channels) + both // 2 * (2 * width + channels)
    walks = 3 * both * (width + channels) + both * width
    return walks + inside(batch, tokens, heads, 3 * count + 3 * channels)


def inside(batch: int, tokens: int, heads: int, width: int) -> int:
    """Products of the tokens of a chunk with each other."""
    return 2 * batch * tokens * heads * min(CHUNK, tokens) * width

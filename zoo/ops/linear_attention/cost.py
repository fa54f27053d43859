"""Matrix-product FLOPs of linear attention."""

from __future__ import annotations

from zoo.ops.linear_attention.channel_decay import CHUNK as CHANNEL_CHUNK
from zoo.ops.semiseparable.cost import CHUNK
from zoo.ops.semiseparable.cost import flops as scan_flops


def flops(
    batch: int,
    tokens: int,
    heads: int,
    state: int,
    channels: int,
    *,
    causal: bool = True,
    normalize: bool = False,
    channel_decay: bool = False,
) -> int:
    """FLOPs of the forward, 2 per multiply-add, with P' = P + 1 if `normalize`.

    causal=False: 4 B T H N P', the sum and its reading. causal=True: 2 B T H (K N + K P' + 2 N P') with chunks of
    K = min(64, T) tokens (16 with a decay per channel); one token (T = 1) is the plain recurrence.
    """
    width = channels + normalize
    if not causal:
        return 4 * batch * tokens * heads * state * width
    chunk = CHANNEL_CHUNK if channel_decay else CHUNK
    return scan_flops(batch, tokens, heads, heads, state, width, chunk=chunk)

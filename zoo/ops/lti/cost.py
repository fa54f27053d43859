"""Matrix-product FLOPs of the diagonal scan in chunks."""

from __future__ import annotations

CHUNK = 64


def flops(batch: int, tokens: int, channels: int, modes: int, *, chunk: int = CHUNK, directions: int = 1) -> int:
    """FLOPs of the forward, 2 per multiply-add: 2 B T D (K + directions 2 M [+ directions 2 M if T > K]).

    K = min(chunk, T) tokens of a chunk, M = modes (complex, N = 2 M). The terms: the Toeplitz tile (both directions
    share it), what a chunk adds to the states, what its tokens read from them. directions: 2 with a reverse kernel.
    One token (T = 1) is the plain recurrence, a product with the weights: 4 B D M.
    """
    span = min(chunk, tokens)
    if tokens == 1:
        return 4 * batch * channels * modes
    states = 2 * modes * directions * (2 if tokens > span else 1)
    return 2 * batch * tokens * channels * (span + states)

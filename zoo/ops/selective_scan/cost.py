"""FLOPs of the selective scan. It holds no matrix product, so its arithmetic is counted as it stands."""

from __future__ import annotations


def flops(batch: int, tokens: int, channels: int, state: int) -> int:
    """FLOPs of the forward beside one exponential for each element of the state and token: 6 B T E N.

    dt A, dt x B, decay times state plus that (2), and the read-out (2).
    """
    return 6 * batch * tokens * channels * state


def backward_flops(batch: int, tokens: int, channels: int, state: int) -> int:
    """FLOPs of the backward: states again (4), read-out again for the gate (2), gradient of the state (3), its products
    with inputs, keys and queries (6), and the gradients of decay and time step (5)."""
    return 20 * batch * tokens * channels * state

"""The selective scan in plain PyTorch, as custom operators that compile and differentiate."""

from __future__ import annotations

from torch import Tensor

from zoo.ops.selective_scan.chunked import forward, states_shape
from zoo.ops.selective_scan.chunked_gradients import backward
from zoo.ops.selective_scan.operators import define

plain_forward, plain_backward = define("selective_scan_plain", forward, backward, states_shape)


def selective_scan_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `selective_scan`, B and C [B,T,G,N]."""
    y, final_state, _ = plain_forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus)
    return y, final_state

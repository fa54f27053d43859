"""The selective scan by Triton kernels, as custom operators that compile and differentiate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.ops.selective_scan.operators import define

KERNEL_DTYPES = ("float32", "bfloat16", "float16")
WIDEST = 256
CHUNK = 64  # tokens between two states that the forward keeps


def refuses(*, N: int, empty: bool, **other: object) -> str | None:
    """Why the kernels cannot serve a call, or None. N: state channels. empty: x has no element."""
    if N > WIDEST:
        return f"keeps at most {WIDEST} states of a channel, wanted N={N}"
    if empty:
        return "x is empty"
    return None


def _states_shape(x: Tensor, B: Tensor) -> tuple[int, ...]:
    """States at the multiples of CHUNK inside sequences: room for as many as the tokens can have."""
    return x.shape[0] * x.shape[1] // CHUNK, x.shape[2], B.shape[3]


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from zoo.ops.selective_scan.kernels import launch

    return launch.forward(*inputs)


def _backward(*inputs: Any) -> list[Tensor | None]:
    from zoo.ops.selective_scan.kernels import launch_backward

    return launch_backward.backward(*inputs)


triton_forward, triton_backward = define("selective_scan", _forward, _backward, _states_shape)


def selective_scan_triton(
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
    """Shapes as in `selective_scan`, B and C [B,T,G,N]; x is not empty."""
    y, final_state, _ = triton_forward(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus)
    return y, final_state

"""SSD, the state space duality operator of Mamba-2: a selective recurrence with one decay per head."""

from __future__ import annotations

import math

from torch import Tensor

from sequence_mixer.errors import ConfigError, DtypeError, ShapeError
from sequence_mixer.shapes import (
    accumulation_dtype,
    expect_cu_seqlens,
    expect_floating,
    expect_same_device,
    expect_shape,
)
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select
from zoo.ops.semiseparable.cost import flops
from zoo.ops.semiseparable.triton_path import KERNEL_DTYPES, refuses
from zoo.ops.ssd.quadratic import mixing_matrix, ssd_quadratic
from zoo.ops.ssd.reference import ssd_reference
from zoo.ops.ssd.scan import ssd_chunked
from zoo.ops.ssd.time_step import time_step
from zoo.ops.ssd.triton_path import ssd_triton

__all__ = ["flops", "mixing_matrix", "ssd", "ssd_quadratic", "time_step"]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t + D x_t, with dt = clamp(softplus(dt + dt_bias)).

    x: [B,T,H,P]. B, C: [B,T,G,N] in the dtype of x; head h reads group h // (H / G).
    dt: [B,T,H], time steps before bias, softplus and clamp. A: [H], <= 0. D: [H] or [H,P]. dt_bias: [H].
        These may be float32 beside a half precision x; they are used in the accumulation dtype.
    dt_softplus: apply softplus to dt + dt_bias. dt_limit: smallest and largest time step after it.
    initial_state: [B,H,P,N], or [S,H,P,N] with `cu_seqlens`; None for zeros.
    cu_seqlens: int [S+1], boundaries of S sequences packed in one row (B = 1); empty sequences are legal.
    backend: "auto", "triton", "chunked" or "reference".
    Returns y [B,T,H,P] in the dtype of x and the final state, shaped like `initial_state`, in the accumulation dtype.
    Raises ShapeError, DtypeError, DeviceError, PackingError, BackendError; ConfigError if dt_limit is empty.
    Source: Dao & Gu 2024, arXiv 2405.21060, sections 5 to 7.
    """
    expect_floating("x", x)
    sizes = expect_shape("x", x, "B T H P")
    sizes = expect_shape("B", B, "B T G N", sizes)
    sizes = expect_shape("C", C, "B T G N", sizes)
    if B.dtype != x.dtype or C.dtype != x.dtype:
        raise DtypeError(f"B is {B.dtype}, C is {C.dtype} and x is {x.dtype}; cast them to one dtype")
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ShapeError(f"x has H={sizes['H']} heads, wanted a multiple of the G={sizes['G']} groups of B and C")
    if min(sizes["H"], sizes["P"], sizes["N"]) == 0:
        raise ShapeError(f"x is {list(x.shape)} and B is {list(B.shape)}; H, P and N must be at least 1")
    sizes["S"] = sizes["B"]
    if cu_seqlens is not None:
        sizes["S"] = expect_cu_seqlens(cu_seqlens, sizes["T"], sizes["B"])
    layouts = {
        "dt": (dt, "B T H"),
        "A": (A, "H"),
        "dt_bias": (dt_bias, "H"),
        "initial_state": (initial_state, "S H P N"),
    }
    layouts["D"] = (D, "H" if D is None or D.dim() == 1 else "H P")
    for argument, (tensor, layout) in layouts.items():
        if tensor is not None:
            expect_floating(argument, tensor)
            expect_shape(argument, tensor, layout, sizes)
    expect_same_device(
        x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    low, high = dt_limit
    if not low <= high:
        raise ConfigError(f"dt_limit is {dt_limit}, wanted (smallest, largest) with smallest <= largest")
    if initial_state is not None:
        initial_state = initial_state.to(accumulation_dtype(x.dtype))
    tensors = (x, dt, A, B, C, D, dt_bias, initial_state)
    fn = select("ssd", backend, tensors, {letter: sizes[letter] for letter in "NP"})
    y, final_state = fn(x, dt, A, B, C, D, dt_bias, dt_softplus, (low, high), initial_state, cu_seqlens)
    return y, final_state


register_backend(
    "ssd", Serves("triton", ("cuda",), KERNEL_DTYPES, needs=("triton",)), ssd_triton, refuses=refuses, priority=KERNEL
)
register_backend("ssd", Serves("chunked"), ssd_chunked, priority=PLAIN)
register_backend("ssd", Serves("reference"), ssd_reference, priority=REFERENCE)

"""Selective scan, the operator of Mamba-1: a recurrence whose decay differs in every channel and state."""

from __future__ import annotations

from torch import Tensor

from sequence_mixer.errors import DtypeError, ShapeError
from sequence_mixer.shapes import (
    accumulation_dtype,
    expect_cu_seqlens,
    expect_floating,
    expect_same_device,
    expect_shape,
)
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select
from zoo.ops.selective_scan.cost import flops
from zoo.ops.selective_scan.matrix import mixing_matrix
from zoo.ops.selective_scan.plain_path import selective_scan_chunked
from zoo.ops.selective_scan.reference import selective_scan_reference
from zoo.ops.selective_scan.triton_path import KERNEL_DTYPES, refuses, selective_scan_triton

__all__ = ["flops", "mixing_matrix", "selective_scan"]


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t and y_t = (<C_t, h_t> + D x_t) silu(z_t), each channel on its own.

    x: [B,T,E]. z: [B,T,E], the gate, in the dtype of x; None for no gate.
    dt: [B,T,E], time steps before bias and softplus. A: [E,N], <= 0. D, dt_bias: [E].
        These may be float32 beside a half precision x; they are used in the accumulation dtype.
    B, C: [B,T,N], or [B,T,G,N] where channel e reads group e // (E / G); in the dtype of x. G = E with an expanded
        tensor serves constant B or C.
    dt_softplus: dt is softplus(dt + dt_bias).
    initial_state: [B,E,N], or [S,E,N] with `cu_seqlens`; None for zeros.
    cu_seqlens: int [S+1], boundaries of S sequences packed in one row (B = 1); empty sequences are legal.
    backend: "auto", "triton", "chunked" or "reference".
    Returns y [B,T,E] in the dtype of x and the final state, shaped like `initial_state`, in the accumulation dtype.
    Raises ShapeError, DtypeError, DeviceError, PackingError, BackendError.
    Source: Gu & Dao 2023, arXiv 2312.00752, with dt B for the discrete B, as the authors' code has it.
    """
    expect_floating("x", x)
    sizes = expect_shape("x", x, "B T E")
    for argument, keys in (("B", B), ("C", C)):
        if keys.dtype != x.dtype:
            raise DtypeError(f"{argument} is {keys.dtype}, x is {x.dtype}; cast them to one dtype")
    B, C = (keys.unsqueeze(2) if keys.dim() == 3 else keys for keys in (B, C))
    sizes = expect_shape("B", B, "B T G N", sizes)
    sizes = expect_shape("C", C, "B T G N", sizes)
    if min(sizes["E"], sizes["G"], sizes["N"]) == 0:
        raise ShapeError(f"x is {list(x.shape)} and B is {list(B.shape)}; E, G and N must be at least 1")
    if sizes["E"] % sizes["G"]:
        raise ShapeError(f"x has E={sizes['E']} channels, wanted a multiple of the G={sizes['G']} groups of B and C")
    sizes["S"] = sizes["B"]
    if cu_seqlens is not None:
        sizes["S"] = expect_cu_seqlens(cu_seqlens, sizes["T"], sizes["B"])
    layouts = {
        "dt": (dt, "B T E"),
        "A": (A, "E N"),
        "D": (D, "E"),
        "z": (z, "B T E"),
        "dt_bias": (dt_bias, "E"),
        "initial_state": (initial_state, "S E N"),
    }
    for argument, (tensor, layout) in layouts.items():
        if tensor is not None:
            expect_floating(argument, tensor)
            expect_shape(argument, tensor, layout, sizes)
    if z is not None and z.dtype != x.dtype:
        raise DtypeError(f"z is {z.dtype}, x is {x.dtype}; cast them to one dtype")
    expect_same_device(
        x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    if initial_state is not None:
        initial_state = initial_state.to(accumulation_dtype(x.dtype))
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    fn = select("selective_scan", backend, tensors, {"N": sizes["N"], "empty": x.numel() == 0})
    y, final_state = fn(*tensors, cu_seqlens, dt_softplus)
    return y, final_state


register_backend(
    "selective_scan",
    Serves("triton", ("cuda",), KERNEL_DTYPES, needs=("triton",)),
    selective_scan_triton,
    refuses=refuses,
    priority=KERNEL,
)
register_backend("selective_scan", Serves("chunked"), selective_scan_chunked, priority=PLAIN)
register_backend("selective_scan", Serves("reference"), selective_scan_reference, priority=REFERENCE)

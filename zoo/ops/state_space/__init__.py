"""State space scan with dense transitions: h_t = A h_{t-1} + B x_t and y_t = C h_t, one system per channel.

What a linear time-invariant layer runs whose transition has no well conditioned diagonal form (S4: the eigenvectors of
the HiPPO matrices grow exponentially with N). Powers of A are formed by squaring, which is stable wherever A does not
expand, as the bilinear transform of a dissipative system never does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.errors import ShapeError
from sequence_mixer.shapes import (
    accumulation_dtype,
    expect_cu_seqlens,
    expect_floating,
    expect_same_device,
    expect_shape,
)
from zoo.ops.dispatch import PLAIN, REFERENCE, Serves, register_backend, select
from zoo.ops.state_space.chunked import state_space_chunked
from zoo.ops.state_space.reference import state_space_reference

__all__ = ["state_space_scan"]


def state_space_scan(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = A h_{t-1} + B x_t, y_t = C h_t + D x_t for every channel, with N state numbers and R outputs each.

    x: [B,T,D]. A: [D,N,N]. B: [D,N]. C: [D,R,N]. D: [R,D] or None. The system may be wider than x: its powers are
        formed in the dtype of A.
    initial_state: [B,D,N], or [S,D,N] with `cu_seqlens`; None for zeros.
    cu_seqlens: int [S+1], boundaries of S sequences packed in one row (B = 1); empty sequences are legal.
    backend: "auto", "chunked" or "reference".
    Returns y [B,T,R,D] in the dtype of x and the final state, shaped like `initial_state`, in the accumulation dtype.
    Raises ShapeError, DtypeError, DeviceError, PackingError or BackendError.
    """
    sizes = expect_shape("x", x, "B T D")
    sizes = expect_shape("A", A, "D N N", sizes)
    sizes = expect_shape("B", B, "D N", sizes)
    sizes = expect_shape("C", C, "D R N", sizes)
    if D is not None:
        expect_shape("D", D, "R D", sizes)
    if min(sizes["D"], sizes["R"], sizes["N"]) == 0:
        raise ShapeError(f"C has shape {list(C.shape)}, wanted [D, R, N] with no axis of 0")
    for name, tensor in (("x", x), ("A", A), ("B", B), ("C", C), ("D", D), ("initial_state", initial_state)):
        if tensor is not None:
            expect_floating(name, tensor)
    sizes["S"] = sizes["B"]
    if cu_seqlens is not None:
        sizes["S"] = expect_cu_seqlens(cu_seqlens, sizes["T"], sizes["B"])
    if initial_state is not None:
        expect_shape("initial_state", initial_state, "S D N", sizes)
    expect_same_device(x, A=A, B=B, C=C, D=D, initial_state=initial_state, cu_seqlens=cu_seqlens)
    acc = accumulation_dtype(x.dtype)
    before = None if initial_state is None else initial_state.to(acc)
    fn = select("state_space_scan", backend, (x, A, B, C, D, initial_state))
    with torch.autocast(x.device.type, enabled=False):
        y, final = fn(x.to(acc), A, B, C, before, cu_seqlens)
        if D is not None:
            y = y + D.to(acc) * x.to(acc).unsqueeze(2)
    return y.to(x.dtype), final


register_backend("state_space_scan", Serves("reference"), state_space_reference, priority=REFERENCE)
register_backend("state_space_scan", Serves("chunked"), state_space_chunked, priority=PLAIN)

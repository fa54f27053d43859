"""Semiseparable scan: the recurrence that the SSD and linear attention operators share (internal to `zoo.ops`)."""

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
from zoo.ops.semiseparable.chunked import semiseparable_chunked
from zoo.ops.semiseparable.cost import flops
from zoo.ops.semiseparable.reference import semiseparable_reference
from zoo.ops.semiseparable.triton_path import KERNEL_DTYPES, refuses, semiseparable_triton

__all__ = ["flops", "semiseparable"]


def semiseparable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(log_decay_t) h_{t-1} + scale_t v_t k_t^T and y_t = h_t q_t, one state [P,N] per head.

    q, k: [B,T,G,N]; head h reads group h // (H / G).
    v: [B,T,H,P], of the dtype of q and k.
    log_decay: [B,T,H], natural log of the decay, <= 0, -inf allowed (forgets everything); None for no decay.
    scale: [B,T,H], factor of v that is not rounded to the dtype of v; None for 1.
    initial_state: [B,H,P,N], or [S,H,P,N] with `cu_seqlens`; None for zeros.
    cu_seqlens: int [S+1], boundaries of S sequences packed in one row (B = 1); empty sequences are legal.
    backend: "auto", "triton", "chunked" or "reference".
    Returns y [B,T,H,P] in the dtype of v and the final state, shaped like `initial_state`, in the accumulation dtype.
    Raises ShapeError, DtypeError, DeviceError, PackingError or BackendError.
    Source: Dao & Gu 2024 (SSD); Katharopoulos et al. 2020 is the case without decay.
    """
    expect_floating("v", v)
    sizes = expect_shape("v", v, "B T H P")
    sizes = expect_shape("k", k, "B T G N", sizes)
    sizes = expect_shape("q", q, "B T G N", sizes)
    if q.dtype != v.dtype or k.dtype != v.dtype:
        raise DtypeError(f"q is {q.dtype}, k is {k.dtype} and v is {v.dtype}; cast them to one dtype")
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ShapeError(f"v has H={sizes['H']} heads, wanted a multiple of the G={sizes['G']} groups of q and k")
    if min(sizes["H"], sizes["P"], sizes["N"]) == 0:
        raise ShapeError(f"v is {list(v.shape)} and k is {list(k.shape)}; H, P and N must be at least 1")
    sizes["S"] = sizes["B"]
    if cu_seqlens is not None:
        sizes["S"] = expect_cu_seqlens(cu_seqlens, sizes["T"], sizes["B"])
    for argument, tensor in (("log_decay", log_decay), ("scale", scale)):
        if tensor is not None:
            expect_floating(argument, tensor)
            expect_shape(argument, tensor, "B T H", sizes)
    if initial_state is not None:
        expect_floating("initial_state", initial_state)
        expect_shape("initial_state", initial_state, "S H P N", sizes)
    expect_same_device(
        v, q=q, k=k, log_decay=log_decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    inner = accumulation_dtype(v.dtype)
    log_decay = None if log_decay is None else log_decay.to(inner)
    scale = None if scale is None else scale.to(inner)
    initial_state = None if initial_state is None else initial_state.to(inner)
    facts = {letter: sizes[letter] for letter in "NP"}
    fn = select("semiseparable", backend, (v, q, k, log_decay, scale, initial_state), facts)
    y, final_state = fn(q, k, v, log_decay, scale, initial_state, cu_seqlens)
    return y, final_state


register_backend(
    "semiseparable",
    Serves("triton", ("cuda",), KERNEL_DTYPES, needs=("triton",)),
    semiseparable_triton,
    refuses=refuses,
    priority=KERNEL,
)
register_backend("semiseparable", Serves("chunked"), semiseparable_chunked, priority=PLAIN)
register_backend("semiseparable", Serves("reference"), semiseparable_reference, priority=REFERENCE)

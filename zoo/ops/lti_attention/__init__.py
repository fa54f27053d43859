"""LTI attention: linear attention under a Toeplitz mask that a diagonal state space generates, as in H3.

Source: Fu, Dao et al. 2023 (arXiv 2212.14052), the diagonal SSM of H3 between its two gates.
"""

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
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select, without_autocast
from zoo.ops.lti_attention.chunked import lti_attention_chunked
from zoo.ops.lti_attention.cost import flops, kernel_flops
from zoo.ops.lti_attention.fft import lti_attention_fft
from zoo.ops.lti_attention.reference import lti_attention_reference
from zoo.ops.lti_attention.triton_path import KERNEL_DTYPES, lti_attention_kernels, refuses

SLOWER = PLAIN - 5  # FFTs serve whoever asks for them: chunks are exactly causal and cost less memory

__all__ = ["flops", "kernel_flops", "lti_attention"]


def lti_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    c: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y_i = sum_{j <= i} (K_{i-j} + D d_ij) <q_i, k_j> v_j with K_l = 2 Re sum_n c_n e^{l log_a_n}, head by head.

    As a recurrence over M = N/2 complex modes: S_t[n] = e^{log_a_n} S_{t-1}[n] + k_t v_t^T and
    y_t = q_t^T (2 Re sum_n c_n S_t[n]) + D <q_t, k_t> v_t.

    q, k, v: [B,T,H,P] of one dtype; P >= 1 channels of a head.
    log_a: [H,M,2], (re, im) of the log of the modes, finite, real part <= 0 for a stable one. c: [H,M,2], their weight.
        Both may have any floating dtype beside the inputs; powers are taken in float64, so that float64 values keep
        the phases of slow modes over thousands of tokens.
    D: [H], weight of the token itself, or None.
    initial_state: [B,H,M,2,P,P] (S in place of B under `cu_seqlens`), S before the first token: mode, (re, im), key
        channel, value channel; None for zeros.
    cu_seqlens: int [S+1], boundaries of S sequences packed in one row (B = 1); empty sequences are legal.
    backend: "auto", "triton" (P up to 128), "chunked", "fft" (causal up to rounding) or "reference".
    Returns y [B,T,H,P] in the dtype of v and the final state, shaped like `initial_state`, in the accumulation dtype.
    Raises ShapeError, DtypeError, DeviceError, PackingError, BackendError.
    """
    sizes = _check(q, k, v, log_a, c, D, initial_state, cu_seqlens)
    initial_state = None if initial_state is None else initial_state.to(accumulation_dtype(v.dtype))
    facts = {"P": sizes["P"], "M": sizes["M"], "empty": v.numel() == 0}
    fn = select("lti_attention", backend, (v, q, k, log_a, c, D, initial_state), facts)
    with without_autocast(v):
        y, final_state = fn(q, k, v, log_a, c, D, initial_state, cu_seqlens)
    return y, final_state


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    c: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> dict[str, int]:
    """Check everything that does not depend on the implementation; returns sizes by letter."""
    expect_floating("q", q)
    sizes = expect_shape("q", q, "B T H P")
    expect_shape("k", k, "B T H P", sizes)
    expect_shape("v", v, "B T H P", sizes)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise DtypeError(f"q is {q.dtype}, k is {k.dtype} and v is {v.dtype}; cast them to one dtype")
    sizes = expect_shape("log_a", log_a, "H M 2", sizes)
    expect_shape("c", c, "H M 2", sizes)
    if min(sizes["H"], sizes["P"], sizes["M"]) == 0:
        raise ShapeError(f"q is {list(q.shape)} and log_a is {list(log_a.shape)}; H, P and M must be at least 1")
    if D is not None:
        expect_shape("D", D, "H", sizes)
    sizes["S"] = sizes["B"]
    if cu_seqlens is not None:
        sizes["S"] = expect_cu_seqlens(cu_seqlens, sizes["T"], sizes["B"])
    if initial_state is not None:
        width = sizes["P"]
        expect_shape("initial_state", initial_state, f"S H M 2 {width} {width}", sizes)
    for name, tensor in (("log_a", log_a), ("c", c), ("D", D), ("initial_state", initial_state)):
        if tensor is not None:
            expect_floating(name, tensor)
    expect_same_device(
        q, k=k, v=v, log_a=log_a, c=c, D=D, initial_state=initial_state, cu_seqlens=cu_seqlens
    )  # fmt: skip
    return sizes


register_backend(
    "lti_attention",
    Serves("triton", ("cuda",), KERNEL_DTYPES, needs=("triton",)),
    lti_attention_kernels,
    refuses=refuses,
    priority=KERNEL,
)
register_backend("lti_attention", Serves("chunked"), lti_attention_chunked, priority=PLAIN)
register_backend("lti_attention", Serves("fft"), lti_attention_fft, priority=SLOWER)
register_backend("lti_attention", Serves("reference"), lti_attention_reference, priority=REFERENCE)

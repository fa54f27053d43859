"""Diagonal linear time-invariant scan: a convolution whose kernel a diagonal state space generates, with its state.

Source: Gu et al. 2022 (S4D, arXiv 2206.11893); also S4 after diagonalising its transition, and the second SSM of H3.
"""

from __future__ import annotations

from torch import Tensor

from sequence_mixer.errors import ConfigError, ShapeError
from sequence_mixer.shapes import (
    accumulation_dtype,
    expect_cu_seqlens,
    expect_floating,
    expect_same_device,
    expect_shape,
)
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select, without_autocast
from zoo.ops.lti.call import Scan
from zoo.ops.lti.chunked import scan_chunked
from zoo.ops.lti.cost import flops
from zoo.ops.lti.fft import fft_refuses, scan_fft
from zoo.ops.lti.reference import scan_reference
from zoo.ops.lti.triton_path import KERNEL_DTYPES, scan_triton, triton_refuses
from zoo.ops.lti.vandermonde import lti_kernel, lti_moments

__all__ = ["flops", "lti_kernel", "lti_moments", "lti_scan"]


def lti_scan(
    x: Tensor,
    log_a: Tensor,
    c: Tensor,
    *,
    D: Tensor | None = None,
    c_reverse: Tensor | None = None,
    reverse_lag: int = 0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y_t = sum_{j <= t} K_{t-j} x_j + D x_t + sum_{j >= t + reverse_lag} R_{j-t-reverse_lag} x_j, channel by channel.

    K_l = 2 Re sum_n c_n e^{l log_a_n} and R_l = 2 Re sum_n c_reverse_n e^{l log_a_n}, over M = N/2 complex modes.
    Forward in time this is the recurrence S_t[n] = e^{log_a_n} S_{t-1}[n] + x_t, y_t = 2 Re sum_n c_n S_t[n] + D x_t.

    x: [B,T,D].
    log_a: [D,M,2], (re, im) of the log of the modes, finite, real part <= 0 for a stable one.
    c: [D,M,2], their weights. Both may have any floating dtype beside x: powers are taken in float64, so float64 values
        of log_a keep the phases of slow modes over many thousands of tokens.
    D: [D], weight of the token itself, or None.
    c_reverse: [D,M,2], weights of the kernel that looks ahead, or None for a causal scan.
    reverse_lag: the token that lag 0 of the kernel ahead meets. 0: the token itself; 1: the next one, as in S4's
        bidirectional layers, where no lag is shared. (1 from 0 needs c e^{-log_a}, which overflows for fast modes.)
    initial_state: [B,D,M,2], S before the first token, (re, im); [S,D,M,2] with `cu_seqlens`; None for zeros. States
        belong to the direction forward in time; nothing comes from beyond the last token.
    cu_seqlens: int [S+1], boundaries of S sequences packed in one row (B = 1); empty sequences are legal.
    backend: "auto", "triton", "chunked", "fft" or "reference". Only fft is causal up to rounding, not exactly.
    Returns y [B,T,D] in the dtype of x and the state after the last token, shaped like `initial_state`, in the
    accumulation dtype; both differentiable in x, log_a, c, D, c_reverse and initial_state.
    Raises ShapeError, DtypeError, DeviceError, PackingError, BackendError; ConfigError for another reverse_lag.
    """
    sizes = expect_shape("x", x, "B T D")
    sizes = expect_shape("log_a", log_a, "D M 2", sizes)
    expect_shape("c", c, "D M 2", sizes)
    if sizes["M"] < 1:
        raise ShapeError(f"log_a has shape {list(log_a.shape)}, wanted [D, M, 2] with at least one mode")
    if reverse_lag not in (0, 1):
        raise ConfigError(f"reverse_lag is {reverse_lag!r}, wanted 0 (lag 0 meets the token) or 1 (the next token)")
    if c_reverse is not None:
        expect_shape("c_reverse", c_reverse, "D M 2", sizes)
    if D is not None:
        expect_shape("D", D, "D", sizes)
    sizes["S"] = sizes["B"]
    if cu_seqlens is not None:
        sizes["S"] = expect_cu_seqlens(cu_seqlens, sizes["T"], sizes["B"])
    if initial_state is not None:
        expect_shape("initial_state", initial_state, "S D M 2", sizes)
    tensors = {"x": x, "log_a": log_a, "c": c, "D": D, "c_reverse": c_reverse, "initial_state": initial_state}
    for name, tensor in tensors.items():
        if tensor is not None:
            expect_floating(name, tensor)
    expect_same_device(
        x, log_a=log_a, c=c, D=D, c_reverse=c_reverse, initial_state=initial_state, cu_seqlens=cu_seqlens
    )  # fmt: skip
    if initial_state is not None:
        initial_state = initial_state.to(accumulation_dtype(x.dtype))
    facts = {"modes": sizes["M"], "packed": cu_seqlens is not None}
    fn = select("lti_scan", backend, list(tensors.values()), facts)
    scan = Scan(log_a, c, D, c_reverse, reverse_lag, initial_state, cu_seqlens)
    with without_autocast(x):
        y, final_state = fn(x, scan)
    return y, final_state


register_backend(
    "lti_scan",
    Serves("triton", ("cuda",), KERNEL_DTYPES, needs=("triton",)),
    scan_triton,
    refuses=triton_refuses,
    priority=KERNEL,
)
register_backend("lti_scan", Serves("chunked"), scan_chunked, priority=PLAIN)
register_backend("lti_scan", Serves("fft"), scan_fft, refuses=fft_refuses, priority=PLAIN - 1)
register_backend("lti_scan", Serves("reference"), scan_reference, priority=REFERENCE)

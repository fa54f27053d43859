"""Long convolution: y = post_gate * (kernel * u + D u) with u = pre_gate * x, one kernel per channel, any length.

Source: the convolution of S4 (Gu et al. 2022), H3 (Fu, Dao et al. 2023, gates and skip included) and Hyena (Poli et al.
2023).
"""

from __future__ import annotations

from torch import Tensor

from sequence_mixer.errors import ConfigError, DtypeError, ShapeError
from sequence_mixer.shapes import expect_cu_seqlens, expect_floating, expect_same_device, expect_shape
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select, without_autocast
from zoo.ops.long_convolution.call import Convolution
from zoo.ops.long_convolution.chunked import convolve_chunked
from zoo.ops.long_convolution.cost import flops
from zoo.ops.long_convolution.crossover import PACKED_LONGEST
from zoo.ops.long_convolution.fft import convolve_fft
from zoo.ops.long_convolution.reference import convolve_reference
from zoo.ops.long_convolution.triton_path import KERNEL_DTYPES, convolve_triton, triton_refuses

__all__ = ["flops", "long_convolution"]


def long_convolution(
    x: Tensor,
    kernel: Tensor,
    *,
    D: Tensor | None = None,
    reverse_kernel: Tensor | None = None,
    reverse_lag: int = 0,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y_t = post_gate_t (sum_l kernel_l u_{t-l} + D u_t + sum_l reverse_kernel_l u_{t+reverse_lag+l}), u = pre_gate x.

    x: [B,T,D].
    kernel: [D,K], any K >= 1; taps that reach before the first token meet zeros.
    D: [D], weight of the token itself, or None.
    reverse_kernel: [D,K'], taps that look ahead, or None for a causal convolution.
    reverse_lag: the token that tap 0 of `reverse_kernel` meets. 0: the token itself, as in FlashConv and H3's fftconv;
        1: the next one, as in S4's bidirectional layers, where the two kernels do not share a tap.
    pre_gate, post_gate: [B,T,D] of the dtype of x, or None. Plain paths do not round the products with them on their
        own; triton rounds u, and in tiles the convolution before post_gate, to the dtype of x.
    cu_seqlens: int [S+1], boundaries of S sequences packed in one row (B = 1); empty sequences are legal.
    backend: "auto", "triton", "fft", "chunked" or "reference". Only fft is causal up to rounding, not exactly: a change
        of u moves earlier outputs by about 1e-7 of its size in float32. It sums spectra in the accumulation dtype and
        pads so that nothing wraps around. With cu_seqlens it reads the lengths in eager mode (a GPU synchronises);
        compiled, every sequence is padded to T.
    Returns y [B,T,D] in the dtype of x. Kernels and D may have another floating dtype; sums are in the accumulation
    dtype. Raises ShapeError, DtypeError, DeviceError, PackingError, BackendError; ConfigError for another reverse_lag.
    """
    sizes = expect_shape("x", x, "B T D")
    sizes = expect_shape("kernel", kernel, "D K", sizes)
    reverse_taps = 0
    if reverse_kernel is not None:
        reverse_taps = expect_shape("reverse_kernel", reverse_kernel, "D R", sizes)["R"]
    if sizes["K"] < 1 or (reverse_kernel is not None and reverse_taps < 1):
        raise ShapeError("kernel and reverse_kernel need at least one tap, [D, K] with K >= 1")
    if reverse_lag not in (0, 1):
        raise ConfigError(f"reverse_lag is {reverse_lag!r}, wanted 0 (tap 0 meets the token) or 1 (the next token)")
    if D is not None:
        expect_shape("D", D, "D", sizes)
    for name, gate in (("pre_gate", pre_gate), ("post_gate", post_gate)):
        if gate is not None:
            expect_shape(name, gate, "B T D", sizes)
            if gate.dtype != x.dtype:
                raise DtypeError(f"{name} is {gate.dtype} and x is {x.dtype}; cast them to one dtype")
    for name, tensor in (("x", x), ("kernel", kernel), ("D", D), ("reverse_kernel", reverse_kernel)):
        if tensor is not None:
            expect_floating(name, tensor)
    expect_same_device(
        x, kernel=kernel, D=D, reverse_kernel=reverse_kernel, pre_gate=pre_gate, post_gate=post_gate,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if cu_seqlens is not None:
        expect_cu_seqlens(cu_seqlens, sizes["T"], sizes["B"])
    facts = {
        "taps": min(sizes["K"], sizes["T"]) + min(reverse_taps, sizes["T"]),
        "empty": x.numel() == 0,
        "packed": cu_seqlens is not None,
        "auto": backend == "auto",
        "longest": PACKED_LONGEST.get(x.dtype, 0),
    }
    tensors = (x, kernel, D, reverse_kernel, pre_gate, post_gate)
    convolve = select("long_convolution", backend, tensors, facts)
    call = Convolution(kernel, D, reverse_kernel, reverse_lag, pre_gate, post_gate, cu_seqlens)
    with without_autocast(x):
        y: Tensor = convolve(x, call)
    return y


register_backend(
    "long_convolution",
    Serves("triton", devices=("cuda",), dtypes=KERNEL_DTYPES, needs=("triton",)),
    convolve_triton,
    refuses=triton_refuses,
    priority=KERNEL,
)
register_backend("long_convolution", Serves("fft"), convolve_fft, priority=PLAIN)  # faster at every length on a CPU
register_backend("long_convolution", Serves("chunked"), convolve_chunked, priority=PLAIN - 1)
register_backend("long_convolution", Serves("reference"), convolve_reference, priority=REFERENCE)

"""Short causal depthwise convolution: y_t = act(bias + sum_k weight_k x_{t-W+1+k}), each channel on its own.

Source: the token shift in front of the scans of Mamba (Gu & Dao 2023), H3 (Fu et al. 2023) and Hyena (Poli et al.
2023). The inputs before the first token are the state, zeros by default.
"""

from __future__ import annotations

from torch import Tensor

from sequence_mixer.errors import ConfigError, ShapeError
from sequence_mixer.shapes import expect_cu_seqlens, expect_floating, expect_same_device, expect_shape
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select
from zoo.ops.short_convolution import chunked, reference
from zoo.ops.short_convolution.triton_path import short_convolution_triton

__all__ = ["flops", "short_convolution"]

MAX_KERNEL_WIDTH = 8  # taps of the Triton kernels with an activation, which unroll W^2 terms
MAX_LOOPED_WIDTH = 256  # taps of those without: products on tensor cores as far as they serve, else loops over taps


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own W taps, looking back only.

    x: [B,T,D]. weight: [D,W], W >= 1; weight[:, W-1] meets the current token. bias: [D] or None. Both may have
        another floating dtype than x.
    activation: None, or "silu" (also spelt "swish").
    initial_state: [B,D,W-1], the inputs before the first token, oldest first, rounded to the dtype of x; zeros if None.
    cu_seqlens: int [S+1], boundaries of S sequences packed into x [1,T,D]; nothing crosses one; states have batch S.
        Empty sequences are served: their state passes through.
    backend: "auto", "triton", "chunked" or "reference".
    Returns y [B,T,D] and the final state [B,D,W-1], the last W-1 entries of (initial state, tokens), both in the dtype
    of x and differentiable. Sums are in the accumulation dtype.
    Raises ShapeError, DtypeError, DeviceError, PackingError, BackendError; ConfigError for an unknown activation.
    """
    sizes = expect_shape("x", x, "B T D")
    sizes = expect_shape("weight", weight, "D W", sizes)
    width = sizes["W"]
    if width < 1:
        raise ShapeError(f"weight has shape {list(weight.shape)}, wanted [D, W] with at least one tap")
    if bias is not None:
        sizes = expect_shape("bias", bias, "D", sizes)
    if activation not in (None, "silu", "swish"):
        raise ConfigError(f"activation is {activation!r}, wanted None or 'silu' ('swish' means the same)")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("initial_state", initial_state)):
        if tensor is not None:
            expect_floating(name, tensor)
    expect_same_device(x, weight=weight, bias=bias, initial_state=initial_state, cu_seqlens=cu_seqlens)
    sequences = sizes["B"]
    if cu_seqlens is not None:
        sequences = expect_cu_seqlens(cu_seqlens, sizes["T"], sizes["B"])
    if initial_state is not None:
        letter = "B" if cu_seqlens is None else "S"
        expect_shape("initial_state", initial_state, f"{letter} D {width - 1}", sizes | {letter: sequences})
    facts = {"width": width, "empty": x.numel() == 0, "silu": activation is not None}
    convolve = select("short_convolution", backend, (x, weight, bias, initial_state), facts)
    y, final_state = convolve(
        x, weight, bias, silu=activation is not None, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    return y, final_state


def flops(batch: int, tokens: int, channels: int, width: int) -> int:
    """FLOPs of the forward, 2 per multiply-add: 2 B T D W."""
    return 2 * batch * tokens * channels * width


def _triton_refuses(width: int, empty: bool, silu: bool) -> str | None:
    most = MAX_KERNEL_WIDTH if silu else MAX_LOOPED_WIDTH
    if width > most:
        return f"takes up to W={most} taps {'with' if silu else 'without'} an activation, weight has {width}"
    if empty:
        return "x is empty"
    return None


register_backend("short_convolution", Serves("reference"), reference.short_convolution_reference, priority=REFERENCE)
register_backend("short_convolution", Serves("chunked"), chunked.short_convolution_chunked, priority=PLAIN)
register_backend(
    "short_convolution",
    Serves("triton", devices=("cuda",), dtypes=("float32", "bfloat16", "float16"), needs=("triton",)),
    short_convolution_triton,
    refuses=_triton_refuses,
    priority=KERNEL,
)

"""Gated RMS normalisation: channels over their root mean square, times a weight, gated by silu(z) before or after.

Source: Zhang & Sennrich 2019 for the norm; the gate in front of it is that of Mamba-2 (Dao & Gu 2024), the gate
behind it that of RetNet (Sun et al. 2023).
"""

from __future__ import annotations

from torch import Tensor

from sequence_mixer.errors import ConfigError, DtypeError, ShapeError
from sequence_mixer.shapes import expect_floating, expect_same_device, expect_shape
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select
from zoo.ops.norm import chunked, reference
from zoo.ops.norm.triton_path import gated_rms_norm_triton

__all__ = ["flops", "gated_rms_norm"]

MAX_KERNEL_GROUP = 16384  # one program holds a whole group


def gated_rms_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Normalise the last axis, with a gate.

    x: [...,D], any leading shape. z: the gate, shape and dtype of x, or None for a plain norm.
    weight: [D], any floating dtype.
    eps: >= 0, added to the mean square.
    group_size: channels that share one root mean square, a divisor of D; D by default.
    norm_before_gate: False for rmsnorm(x silu(z)) weight, True for rmsnorm(x) weight silu(z).
    backend: "auto", "triton", "chunked" or "reference".
    Returns y [...,D] in the dtype of x; everything inside is in the accumulation dtype.
    Raises ShapeError, DtypeError, DeviceError, BackendError; ConfigError for a negative eps.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ShapeError(f"x has shape {list(x.shape)}, wanted [..., D] with at least one channel")
    channels = x.shape[-1]
    expect_shape("weight", weight, "D", {"D": channels})
    if z is not None and z.shape != x.shape:
        raise ShapeError(f"z has shape {list(z.shape)}, wanted that of x, {list(x.shape)}")
    group = channels if group_size is None else group_size
    if group < 1 or channels % group:
        raise ShapeError(f"group_size={group} does not divide the D={channels} channels of x; choose a divisor")
    expect_floating("x", x)
    expect_floating("weight", weight)
    if z is not None and z.dtype != x.dtype:
        raise DtypeError(f"z is {z.dtype}, x is {x.dtype}; cast one, they must agree")
    expect_same_device(x, z=z, weight=weight)
    if eps < 0:
        raise ConfigError(f"eps is {eps}, wanted a number >= 0")
    facts = {"group": group, "empty": x.numel() == 0}
    normalise = select("gated_rms_norm", backend, (x, z, weight), facts)
    y: Tensor = normalise(x, z, weight, eps=float(eps), group_size=group, norm_before_gate=bool(norm_before_gate))
    return y


def flops(rows: int, channels: int) -> int:
    """Matrix-product FLOPs of the forward: none, whatever the sizes; the norm moves memory."""
    return 0 * rows * channels


def _triton_refuses(group: int, empty: bool) -> str | None:
    if group > MAX_KERNEL_GROUP:
        return f"takes groups of up to {MAX_KERNEL_GROUP} channels, these have {group}"
    if empty:
        return "x is empty"
    return None


register_backend("gated_rms_norm", Serves("reference"), reference.gated_rms_norm_reference, priority=REFERENCE)
register_backend("gated_rms_norm", Serves("chunked"), chunked.gated_rms_norm_chunked, priority=PLAIN)
register_backend(
    "gated_rms_norm",
    Serves("triton", devices=("cuda",), dtypes=("float32", "bfloat16", "float16"), needs=("triton",)),
    gated_rms_norm_triton,
    refuses=_triton_refuses,
    priority=KERNEL,
)

"""One token of the short convolution that shifts its state in place: what decoding calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sequence_mixer.errors import ConfigError, ShapeError
from sequence_mixer.shapes import expect_floating, expect_same_device, expect_shape
from zoo.ops.custom import refuse_higher_order
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select
from zoo.ops.in_place import expect_in_place, steps_in_place
from zoo.ops.short_convolution import short_convolution
from zoo.ops.short_convolution.chunked import short_convolution_chunked

WIDEST = 1024  # taps of a channel that one program holds


def short_convolution_step(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """`short_convolution` for one token, whose state is shifted in place.

    x: [B,D]. weight: [D,W], W >= 1; weight[:, W-1] meets x. bias: [D] or None. Both may have another floating dtype.
    state: [B,D,W-1], the inputs before x, oldest first, overwritten; in the dtype of x, and not expanded.
    activation: None, or "silu" (also spelt "swish").
    backend: "auto", "triton" (W of 2 to 1025), "chunked" (PyTorch) or "reference".
    Returns y [B,D] in the dtype of x. Has no gradient. The kernel reads and writes the state once, allocates y alone,
    and may be captured in a CUDA graph.
    Raises ShapeError, DtypeError, DeviceError, StateError, ConfigError for an unknown activation, BackendError also if
    an input requires grad while grad mode is on.
    """
    sizes = expect_shape("x", x, "B D")
    sizes = expect_shape("weight", weight, "D W", sizes)
    if sizes["W"] < 1:
        raise ShapeError(f"weight has shape {list(weight.shape)}, wanted [D, W] with at least one tap")
    if bias is not None:
        expect_shape("bias", bias, "D", sizes)
    if activation not in (None, "silu", "swish"):
        raise ConfigError(f"activation is {activation!r}, wanted None or 'silu' ('swish' means the same)")
    expect_shape("state", state, f"B D {sizes['W'] - 1}", sizes)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("state", state)):
        if tensor is not None:
            expect_floating(name, tensor)
    expect_same_device(x, weight=weight, bias=bias, state=state)
    expect_in_place("short_convolution_step", "short_convolution", state, x.dtype, x, weight, bias)
    fn = select("short_convolution_step", backend, (x,), {"width": sizes["W"]})
    y: Tensor = fn(x, weight, bias, activation is not None, state)
    return y


def convolve_next(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    *,
    activation: str | None = None,
    cu_seqlens: Tensor | None,
    donate: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`short_convolution` of x [B,T,D] after `past`, which is shifted in place if it is given up and T = 1."""
    if past is not None and steps_in_place(
        "short_convolution_step", backend, past, x, donate=donate, cu_seqlens=cu_seqlens, dtype=x.dtype
    ):
        y = short_convolution_step(x.squeeze(1), weight, past, bias, activation=activation, backend=backend)
        return y.unsqueeze(1), past
    return short_convolution(
        x, weight, bias, activation=activation, initial_state=past, cu_seqlens=cu_seqlens, backend=backend
    )


def step_plain(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor) -> Tensor:
    """Shapes as in `short_convolution_step`; in PyTorch, for every device and dtype."""
    tokens = x.unsqueeze(1)
    y, after = short_convolution_chunked(tokens, weight, bias, silu=silu, initial_state=state, cu_seqlens=None)
    state.copy_(after)
    return y.squeeze(1)


def step_reference(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor) -> Tensor:
    """The definition with T = 1, and a copy."""
    activation = "silu" if silu else None
    y, after = short_convolution(
        x.unsqueeze(1), weight, bias, activation=activation, initial_state=state, backend="reference"
    )  # fmt: skip
    state.copy_(after)
    return y.squeeze(1)


@torch.library.custom_op("zoo::short_convolution_step", mutates_args=("state",))
def step_triton(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor) -> Tensor:
    """Shapes as in `short_convolution_step`, W >= 2."""
    from zoo.ops.short_convolution.kernels.step import launch

    return launch(x, weight, bias, silu, state)


@step_triton.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


refuse_higher_order(step_triton, "short_convolution_step", has_gradient=True)


def refuses(*, width: int, **other: object) -> str | None:
    """Why the kernel cannot serve this many taps, or None."""
    return None if 2 <= width <= WIDEST + 1 else f"takes W of 2 to {WIDEST + 1} taps, weight has {width}"


register_backend(
    "short_convolution_step",
    Serves("triton", ("cuda",), ("float32", "bfloat16", "float16"), training=False, needs=("triton",)),
    step_triton,
    refuses=refuses,
    priority=KERNEL,
)
register_backend("short_convolution_step", Serves("chunked", training=False), step_plain, priority=PLAIN)
register_backend("short_convolution_step", Serves("reference", training=False), step_reference, priority=REFERENCE)

"""One token of the diagonal scan that overwrites its state: what decoding calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sequence_mixer.errors import ShapeError
from sequence_mixer.shapes import accumulation_dtype, expect_floating, expect_same_device, expect_shape
from zoo.ops.custom import refuse_higher_order
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select, without_autocast
from zoo.ops.in_place import expect_in_place
from zoo.ops.lti import lti_scan
from zoo.ops.lti.call import Scan
from zoo.ops.lti.one_token import scan_one_token

MOST_MODES = 1024  # of a channel, that one program holds


def lti_scan_step(
    x: Tensor, log_a: Tensor, c: Tensor, state: Tensor, *, D: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """`lti_scan` for one token, forward in time: S = e^{log_a} S + x in place, and y = 2 Re sum_n c_n S_n + D x.

    x: [B,D]. log_a, c: [D,M,2], (re, im) of the log of the modes and of their weights, of any floating dtype; factors
        are made in float64. D: [D], or None.
    state: [B,D,M,2], overwritten; in the accumulation dtype of x, and not expanded.
    backend: "auto", "triton" (M up to 1024), "chunked" (PyTorch) or "reference".
    Returns y [B,D] in the dtype of x. Has no gradient. The kernels read and write the state once, allocate y and the
    factors [D,M,4], and may be captured in a CUDA graph.
    Raises ShapeError, DtypeError, DeviceError, StateError, BackendError; the latter also if an input requires grad
    while grad mode is on.
    """
    sizes = expect_shape("x", x, "B D")
    sizes = expect_shape("log_a", log_a, "D M 2", sizes)
    expect_shape("c", c, "D M 2", sizes)
    if sizes["M"] < 1:
        raise ShapeError(f"log_a has shape {list(log_a.shape)}, wanted [D, M, 2] with at least one mode")
    if D is not None:
        expect_shape("D", D, "D", sizes)
    expect_shape("state", state, "B D M 2", sizes)
    for name, tensor in (("x", x), ("log_a", log_a), ("c", c), ("D", D), ("state", state)):
        if tensor is not None:
            expect_floating(name, tensor)
    expect_same_device(x, log_a=log_a, c=c, D=D, state=state)
    expect_in_place("lti_scan_step", "lti_scan", state, accumulation_dtype(x.dtype), x, log_a, c, D)
    fn = select("lti_scan_step", backend, (x,), {"modes": sizes["M"]})
    with without_autocast(x):
        y: Tensor = fn(x, log_a, c, D, state)
    return y


def step_plain(x: Tensor, log_a: Tensor, c: Tensor, D: Tensor | None, state: Tensor) -> Tensor:
    """Shapes as in `lti_scan_step`; in PyTorch, for every device and dtype."""
    y, after = scan_one_token(x.unsqueeze(1), Scan(log_a, c, D, None, 0, state, None))
    state.copy_(after)
    return y.squeeze(1)


def step_reference(x: Tensor, log_a: Tensor, c: Tensor, D: Tensor | None, state: Tensor) -> Tensor:
    """The definition with T = 1, and a copy."""
    y, after = lti_scan(x.unsqueeze(1), log_a, c, D=D, initial_state=state, backend="reference")
    state.copy_(after)
    return y.squeeze(1)


@torch.library.custom_op("zoo::lti_scan_step", mutates_args=("state",))
def step_triton(x: Tensor, log_a: Tensor, c: Tensor, D: Tensor | None, state: Tensor) -> Tensor:
    """Shapes as in `lti_scan_step`; float32 state."""
    from zoo.ops.lti.kernels.step import launch

    return launch(x, None, None, log_a, c, D, state)


@step_triton.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


refuse_higher_order(step_triton, "lti_scan_step", has_gradient=True)


def refuses(*, modes: int, **other: object) -> str | None:
    """Why the kernel cannot serve this many modes, or None."""
    return None if modes <= MOST_MODES else f"holds at most {MOST_MODES} modes of a channel, log_a has {modes}"


register_backend(
    "lti_scan_step",
    Serves("triton", ("cuda",), ("float32", "bfloat16", "float16"), training=False, needs=("triton",)),
    step_triton,
    refuses=refuses,
    priority=KERNEL,
)
register_backend("lti_scan_step", Serves("chunked", training=False), step_plain, priority=PLAIN)
register_backend("lti_scan_step", Serves("reference", training=False), step_reference, priority=REFERENCE)

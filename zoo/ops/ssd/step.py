"""One token of SSD that overwrites its state: what decoding calls."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sequence_mixer.errors import ConfigError, DtypeError, ShapeError
from sequence_mixer.shapes import accumulation_dtype, expect_floating, expect_same_device, expect_shape
from zoo.ops.custom import refuse_higher_order
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select, without_autocast
from zoo.ops.in_place import expect_in_place
from zoo.ops.ssd import ssd

WIDEST = 1024  # state channels of a head that one program holds


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    backend: str = "auto",
) -> Tensor:
    """`ssd` for one token: state = exp(dt A) state + dt x B^T in place, and y = state C + D x.

    x: [B,H,P]. B, C: [B,G,N] in the dtype of x; head h reads group h // (H / G).
    dt: [B,H], time step before bias, softplus and clamp. A: [H], <= 0. D: [H] or [H,P]. dt_bias: [H].
        These may be float32 beside a half precision x; they are used in the accumulation dtype.
    state: [B,H,P,N], overwritten; in the accumulation dtype of x, and not expanded.
    dt_softplus: apply softplus to dt + dt_bias. dt_limit: smallest and largest time step after it.
    backend: "auto", "triton" (N up to 1024), "chunked" (PyTorch) or "reference".
    Returns y [B,H,P] in the dtype of x. Has no gradient. The kernel reads and writes the state once, allocates y alone,
    and may be captured in a CUDA graph.
    Raises ShapeError, DtypeError, DeviceError, StateError, ConfigError if dt_limit is empty, BackendError also if an
    input requires grad while grad mode is on.
    """
    expect_floating("x", x)
    sizes = expect_shape("x", x, "B H P")
    sizes = expect_shape("B", B, "B G N", sizes)
    sizes = expect_shape("C", C, "B G N", sizes)
    if B.dtype != x.dtype or C.dtype != x.dtype:
        raise DtypeError(f"B is {B.dtype}, C is {C.dtype} and x is {x.dtype}; cast them to one dtype")
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ShapeError(f"x has H={sizes['H']} heads, wanted a multiple of the G={sizes['G']} groups of B and C")
    if min(sizes["H"], sizes["P"], sizes["N"]) == 0:
        raise ShapeError(f"x is {list(x.shape)} and B is {list(B.shape)}; H, P and N must be at least 1")
    layouts = {"dt": (dt, "B H"), "A": (A, "H"), "dt_bias": (dt_bias, "H"), "state": (state, "B H P N")}
    layouts["D"] = (D, "H" if D is None or D.dim() == 1 else "H P")
    for argument, (tensor, layout) in layouts.items():
        if tensor is not None:
            expect_floating(argument, tensor)
            expect_shape(argument, tensor, layout, sizes)
    expect_same_device(x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, state=state)
    low, high = dt_limit
    if not low <= high:
        raise ConfigError(f"dt_limit is {dt_limit}, wanted (smallest, largest) with smallest <= largest")
    expect_in_place("ssd_step", "ssd", state, accumulation_dtype(x.dtype), x, dt, A, B, C, D, dt_bias)
    fn = select("ssd_step", backend, (x,), {"N": sizes["N"]})
    with without_autocast(x):
        y: Tensor = fn(x, dt, A, B, C, D, dt_bias, state, dt_softplus, float(low), float(high))
    return y


def step_by_scan(
    scan: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    dt_softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    """Shapes as in `ssd_step`; the operator on its backend `scan` with T = 1, bit for bit, and a copy."""
    u, steps, keys, queries = (part.unsqueeze(1) for part in (x, dt, B, C))
    y, after = ssd(
        u, steps, A, keys, queries, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=(low, high),
        initial_state=state, backend=scan,
    )  # fmt: skip
    state.copy_(after)
    return y.squeeze(1)


@torch.library.custom_op("zoo::ssd_step", mutates_args=("state",))
def step_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    dt_softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    """Shapes as in `ssd_step`; float32 state."""
    from zoo.ops.ssd.kernels.step import launch

    return launch(x, dt, A, B, C, D, dt_bias, state, dt_softplus, low, high)


@step_triton.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


refuse_higher_order(step_triton, "ssd_step", has_gradient=True)


def refuses(*, N: int, **other: object) -> str | None:
    """Why the kernel cannot serve N state channels, or None."""
    return None if N <= WIDEST else f"holds at most {WIDEST} state channels of a head, B has N={N}"


register_backend(
    "ssd_step",
    Serves("triton", ("cuda",), ("float32", "bfloat16", "float16"), training=False, needs=("triton",)),
    step_triton,
    refuses=refuses,
    priority=KERNEL,
)
for _scan, _priority in (("chunked", PLAIN), ("reference", REFERENCE)):
    register_backend("ssd_step", Serves(_scan, training=False), partial(step_by_scan, _scan), priority=_priority)

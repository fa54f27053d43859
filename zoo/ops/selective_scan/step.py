"""One token of the selective scan that overwrites its state: what decoding calls."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sequence_mixer.errors import DtypeError, ShapeError
from sequence_mixer.shapes import accumulation_dtype, expect_floating, expect_same_device, expect_shape
from zoo.ops.custom import refuse_higher_order
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select, without_autocast
from zoo.ops.in_place import expect_in_place
from zoo.ops.selective_scan import selective_scan

WIDEST = 1024  # states of a channel that one program holds


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`selective_scan` for one token: state = exp(dt A) state + dt x B in place, y = (<C, state> + D x) silu(z).

    x: [B,E]. z: [B,E], the gate, in the dtype of x; None for no gate.
    dt: [B,E], time step before bias and softplus. A: [E,N], <= 0. D, dt_bias: [E].
        These may be float32 beside a half precision x; they are used in the accumulation dtype.
    B, C: [B,N], or [B,G,N] where channel e reads group e // (E / G); in the dtype of x.
    state: [B,E,N], overwritten; in the accumulation dtype of x, and not expanded.
    dt_softplus: dt is softplus(dt + dt_bias).
    backend: "auto", "triton" (N up to 1024), "chunked" (PyTorch) or "reference".
    Returns y [B,E] in the dtype of x. Has no gradient. The kernel reads and writes the state once, allocates y alone,
    and may be captured in a CUDA graph.
    Raises ShapeError, DtypeError, DeviceError, StateError, BackendError; the latter also if an input requires grad
    while grad mode is on.
    """
    expect_floating("x", x)
    sizes = expect_shape("x", x, "B E")
    for argument, keys in (("B", B), ("C", C)):
        if keys.dtype != x.dtype:
            raise DtypeError(f"{argument} is {keys.dtype}, x is {x.dtype}; cast them to one dtype")
    B, C = (keys.unsqueeze(1) if keys.dim() == 2 else keys for keys in (B, C))
    sizes = expect_shape("B", B, "B G N", sizes)
    sizes = expect_shape("C", C, "B G N", sizes)
    if min(sizes["E"], sizes["G"], sizes["N"]) == 0:
        raise ShapeError(f"x is {list(x.shape)} and B is {list(B.shape)}; E, G and N must be at least 1")
    if sizes["E"] % sizes["G"]:
        raise ShapeError(f"x has E={sizes['E']} channels, wanted a multiple of the G={sizes['G']} groups of B and C")
    layouts = {
        "dt": (dt, "B E"),
        "A": (A, "E N"),
        "D": (D, "E"),
        "z": (z, "B E"),
        "dt_bias": (dt_bias, "E"),
        "state": (state, "B E N"),
    }
    for argument, (tensor, layout) in layouts.items():
        if tensor is not None:
            expect_floating(argument, tensor)
            expect_shape(argument, tensor, layout, sizes)
    if z is not None and z.dtype != x.dtype:
        raise DtypeError(f"z is {z.dtype}, x is {x.dtype}; cast them to one dtype")
    expect_same_device(x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state=state)
    inputs = (x, dt, A, B, C, D, z, dt_bias)
    expect_in_place("selective_scan_step", "selective_scan", state, accumulation_dtype(x.dtype), *inputs)
    fn = select("selective_scan_step", backend, (x,), {"N": sizes["N"]})
    with without_autocast(x):
        y: Tensor = fn(*inputs, state, dt_softplus)
    return y


def step_by_scan(
    scan: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    dt_softplus: bool,
) -> Tensor:
    """Shapes as in `selective_scan_step`, B and C [B,G,N]; the operator on backend `scan` with T = 1, and a copy."""
    gate = None if z is None else z.unsqueeze(1)
    u, steps, keys, queries = (part.unsqueeze(1) for part in (x, dt, B, C))
    y, after = selective_scan(
        u, steps, A, keys, queries, D=D, z=gate, dt_bias=dt_bias, dt_softplus=dt_softplus, initial_state=state,
        backend=scan,
    )  # fmt: skip
    state.copy_(after)
    return y.squeeze(1)


@torch.library.custom_op("zoo::selective_scan_step", mutates_args=("state",))
def step_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    dt_softplus: bool,
) -> Tensor:
    """Shapes as in `selective_scan_step`, B and C [B,G,N]; float32 state."""
    from zoo.ops.selective_scan.kernels.step import launch

    return launch(x, dt, A, B, C, D, z, dt_bias, state, dt_softplus)


@step_triton.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


refuse_higher_order(step_triton, "selective_scan_step", has_gradient=True)


def refuses(*, N: int, **other: object) -> str | None:
    """Why the kernel cannot serve N states of a channel, or None."""
    return None if N <= WIDEST else f"holds at most {WIDEST} states of a channel, A has N={N}"


register_backend(
    "selective_scan_step",
    Serves("triton", ("cuda",), ("float32", "bfloat16", "float16"), training=False, needs=("triton",)),
    step_triton,
    refuses=refuses,
    priority=KERNEL,
)
for _scan, _priority in (("chunked", PLAIN), ("reference", REFERENCE)):
    register_backend(
        "selective_scan_step", Serves(_scan, training=False), partial(step_by_scan, _scan), priority=_priority
    )

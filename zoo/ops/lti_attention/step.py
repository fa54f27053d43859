"""One token of LTI attention that overwrites its state: what decoding calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sequence_mixer.errors import DtypeError, ShapeError
from sequence_mixer.shapes import accumulation_dtype, expect_floating, expect_same_device, expect_shape
from zoo.ops.custom import refuse_higher_order
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select, without_autocast
from zoo.ops.in_place import expect_in_place
from zoo.ops.lti_attention import lti_attention
from zoo.ops.lti_attention.one_token import one_token

MOST_MODES = 1024  # of a head, that one program holds


def lti_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    c: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`lti_attention` for one token: S = e^{log_a} S + k v^T in place, y = q^T (2 Re sum_n c_n S_n) + D <q, k> v.

    q, k, v: [B,H,P] of one dtype. log_a, c: [H,M,2], (re, im) of the log of the modes and of their weights, of any
        floating dtype; factors are made in float64. D: [H], or None.
    state: [B,H,M,2,P,P], overwritten; in the accumulation dtype of v, and not expanded.
    backend: "auto", "triton" (P = 1, M up to 1024), "chunked" (PyTorch) or "reference".
    Returns y [B,H,P] in the dtype of v. Has no gradient. The kernels read and write the state once, allocate y and the
    factors [H,M,4], and may be captured in a CUDA graph.
    Raises ShapeError, DtypeError, DeviceError, StateError, BackendError; the latter also if an input requires grad
    while grad mode is on.
    """
    expect_floating("q", q)
    sizes = expect_shape("q", q, "B H P")
    expect_shape("k", k, "B H P", sizes)
    expect_shape("v", v, "B H P", sizes)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise DtypeError(f"q is {q.dtype}, k is {k.dtype} and v is {v.dtype}; cast them to one dtype")
    sizes = expect_shape("log_a", log_a, "H M 2", sizes)
    expect_shape("c", c, "H M 2", sizes)
    if min(sizes["H"], sizes["P"], sizes["M"]) == 0:
        raise ShapeError(f"q is {list(q.shape)} and log_a is {list(log_a.shape)}; H, P and M must be at least 1")
    if D is not None:
        expect_shape("D", D, "H", sizes)
    expect_shape("state", state, f"B H M 2 {sizes['P']} {sizes['P']}", sizes)
    for name, tensor in (("log_a", log_a), ("c", c), ("D", D), ("state", state)):
        if tensor is not None:
            expect_floating(name, tensor)
    expect_same_device(q, k=k, v=v, log_a=log_a, c=c, D=D, state=state)
    expect_in_place("lti_attention_step", "lti_attention", state, accumulation_dtype(v.dtype), q, k, v, log_a, c, D)
    fn = select("lti_attention_step", backend, (v,), {"P": sizes["P"], "modes": sizes["M"]})
    with without_autocast(v):
        y: Tensor = fn(q, k, v, log_a, c, D, state)
    return y


def step_plain(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, c: Tensor, D: Tensor | None, state: Tensor) -> Tensor:
    """Shapes as in `lti_attention_step`; in PyTorch, for every device and dtype."""
    queries, keys, values = (part.unsqueeze(1) for part in (q, k, v))
    y, after = one_token(queries, keys, values, log_a, c, D, state)
    state.copy_(after)
    return y.squeeze(1).to(v.dtype)


def step_reference(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, c: Tensor, D: Tensor | None, state: Tensor
) -> Tensor:
    """The definition with T = 1, and a copy."""
    queries, keys, values = (part.unsqueeze(1) for part in (q, k, v))
    y, after = lti_attention(queries, keys, values, log_a, c, D=D, initial_state=state, backend="reference")
    state.copy_(after)
    return y.squeeze(1)


@torch.library.custom_op("zoo::lti_attention_step", mutates_args=("state",))
def step_triton(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, c: Tensor, D: Tensor | None, state: Tensor) -> Tensor:
    """Shapes as in `lti_attention_step` with P = 1; float32 state."""
    from zoo.ops.lti.kernels.step import launch

    own = state[..., 0, 0]
    return launch(v.squeeze(2), k.squeeze(2), q.squeeze(2), log_a, c, D, own).unsqueeze(2)


@step_triton.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return v.new_empty(v.shape)


refuse_higher_order(step_triton, "lti_attention_step", has_gradient=True)


def refuses(*, P: int, modes: int, **other: object) -> str | None:
    """Why the kernel cannot serve heads of P channels with this many modes, or None."""
    if P != 1:
        return f"serves heads of one channel, q has P={P}"
    return None if modes <= MOST_MODES else f"holds at most {MOST_MODES} modes of a head, log_a has {modes}"


register_backend(
    "lti_attention_step",
    Serves("triton", ("cuda",), ("float32", "bfloat16", "float16"), training=False, needs=("triton",)),
    step_triton,
    refuses=refuses,
    priority=KERNEL,
)
register_backend("lti_attention_step", Serves("chunked", training=False), step_plain, priority=PLAIN)
register_backend("lti_attention_step", Serves("reference", training=False), step_reference, priority=REFERENCE)

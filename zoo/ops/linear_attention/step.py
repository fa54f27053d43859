"""One token of linear attention that overwrites its state: what decoding calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sequence_mixer.errors import DtypeError, ShapeError
from sequence_mixer.shapes import accumulation_dtype, expect_floating, expect_same_device, expect_shape
from zoo.ops.custom import refuse_higher_order
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select, without_autocast
from zoo.ops.in_place import expect_in_place
from zoo.ops.linear_attention import linear_attention
from zoo.ops.linear_attention.feature_map import expect_feature_map, features
from zoo.ops.linear_attention.normaliser import finish, with_ones

WIDEST = 1024  # value channels of a head that one program holds


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    feature_map: str = "identity",
    normalize: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """`linear_attention` for one token: S = exp(log_decay) S + phi(k) v^T in place, and y = scale S^T phi(q).

    q: [B,H,N]. k: [B,G,N], v: [B,G,P], of the dtype of q; query head h reads group h // (H / G).
    state: [B,H,N,P], overwritten, with one more column, the sum of phi(k), under `normalize`: [B,H,N,P+1]. In the
        accumulation dtype of v, and not expanded.
    log_decay: [B,H], or [B,H,N] for a decay per key channel; natural log, <= 0; or None.
    feature_map, normalize, eps, scale: as in `linear_attention`.
    backend: "auto", "triton" (P up to 1024), "chunked" (PyTorch) or "reference".
    Returns y [B,H,P] in the dtype of v. Has no gradient. The kernel reads and writes the state once, allocates y alone,
    and may be captured in a CUDA graph.
    Raises ShapeError, DtypeError, DeviceError, StateError, ConfigError for an unknown feature map, BackendError also if
    an input requires grad while grad mode is on.
    """
    expect_floating("q", q)
    sizes = expect_shape("q", q, "B H N")
    sizes = expect_shape("k", k, "B G N", sizes)
    sizes = expect_shape("v", v, "B G P", sizes)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise DtypeError(f"q is {q.dtype}, k is {k.dtype} and v is {v.dtype}; cast them to one dtype")
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ShapeError(f"q has H={sizes['H']} heads, wanted a multiple of the G={sizes['G']} heads of k and v")
    if min(sizes["H"], sizes["P"], sizes["N"]) == 0:
        raise ShapeError(f"q is {list(q.shape)} and v is {list(v.shape)}; H, N and P must be at least 1")
    expect_feature_map(feature_map)
    expect_floating("state", state)
    expect_shape("state", state, f"B H N {sizes['P'] + normalize}", sizes)
    if log_decay is not None:
        expect_floating("log_decay", log_decay)
        expect_shape("log_decay", log_decay, "B H N" if log_decay.dim() == 3 else "B H", sizes)
    expect_same_device(q, k=k, v=v, log_decay=log_decay, state=state)
    expect_in_place(
        "linear_attention_step", "linear_attention", state, accumulation_dtype(v.dtype), q, k, v, log_decay
    )  # fmt: skip
    fn = select("linear_attention_step", backend, (v,), {"P": sizes["P"]})
    with without_autocast(v):
        y: Tensor = fn(q, k, v, log_decay, state, feature_map, normalize, float(eps), float(scale))
    return y


def step_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    feature_map: str,
    normalize: bool,
    eps: float,
    scale: float,
) -> Tensor:
    """Shapes as in `linear_attention_step`; in PyTorch, for every device and dtype."""
    inner, groups = state.dtype, q.shape[1] // k.shape[1]
    phi_q = features(q, feature_map)
    phi_k, values = features(k, feature_map), with_ones(v.to(inner), normalize)
    phi_k, values = (part.repeat_interleave(groups, 1) for part in (phi_k, values))
    if log_decay is not None:
        decay = log_decay.to(inner).exp()
        state.mul_(decay[..., None] if decay.dim() == 3 else decay[..., None, None])
    state.addcmul_(phi_k.unsqueeze(-1), values.unsqueeze(-2))
    sums = (phi_q.unsqueeze(-2) @ state).squeeze(-2)
    return finish(sums, normalize, eps, scale).to(v.dtype)


def step_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    feature_map: str,
    normalize: bool,
    eps: float,
    scale: float,
) -> Tensor:
    """The definition with T = 1, and a copy."""
    queries, keys, values = (part.unsqueeze(1) for part in (q, k, v))
    y, after = linear_attention(
        queries, keys, values, log_decay=None if log_decay is None else log_decay.unsqueeze(1),
        feature_map=feature_map, normalize=normalize, eps=eps, scale=scale, initial_state=state, backend="reference",
    )  # fmt: skip
    state.copy_(after)
    return y.squeeze(1)


@torch.library.custom_op("zoo::linear_attention_step", mutates_args=("state",))
def step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    feature_map: str,
    normalize: bool,
    eps: float,
    scale: float,
) -> Tensor:
    """Shapes as in `linear_attention_step`; float32 state."""
    from zoo.ops.linear_attention.kernels.step import launch

    return launch(q, k, v, log_decay, state, feature_map, normalize, eps, scale)


@step_triton.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return v.new_empty(*q.shape[:2], v.shape[2])


refuse_higher_order(step_triton, "linear_attention_step", has_gradient=True)


def refuses(*, P: int, **other: object) -> str | None:
    """Why the kernel cannot serve heads of P value channels, or None."""
    return None if P <= WIDEST else f"holds at most {WIDEST} value channels of a head, v has P={P}"


register_backend(
    "linear_attention_step",
    Serves("triton", ("cuda",), ("float32", "bfloat16", "float16"), training=False, needs=("triton",)),
    step_triton,
    refuses=refuses,
    priority=KERNEL,
)
register_backend("linear_attention_step", Serves("chunked", training=False), step_plain, priority=PLAIN)
register_backend("linear_attention_step", Serves("reference", training=False), step_reference, priority=REFERENCE)

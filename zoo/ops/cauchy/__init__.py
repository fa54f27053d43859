"""Cauchy sums: sum_n v_n / (z_k - q_k w_n) + its conjugate pair, the generating functions of state space kernels.

Source: Gu, Goel & Re 2022 (S4), Algorithm 1; here with homogeneous nodes (z, q), so that no node is a pole: z / q would
be infinite at the Nyquist frequency of a bilinear transform. Complex numbers are real pairs in a last axis of 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sequence_mixer.errors import ShapeError
from sequence_mixer.shapes import expect_floating, expect_same_device, expect_shape
from zoo.ops.cauchy.chunked import cauchy_chunked
from zoo.ops.cauchy.reference import cauchy_reference
from zoo.ops.cauchy.triton_path import cauchy_triton
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select, without_autocast

__all__ = ["cauchy_kernel", "flops"]

MOST_SUMS = 64  # sums over the same poles that one Triton program adds up


def cauchy_kernel(v: Tensor, w: Tensor, z: Tensor, q: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """R sums over the same N conjugate pairs of poles, for each of D channels, at K nodes.

    v: [D,R,N,2], weights of the poles, as (re, im).
    w: [D,N,2], poles.
    z: [K,2], nodes. q: [K,2], factors of the poles; None for 1.
    backend: "auto", "triton", "chunked" or "reference". Triton has no gradient for the nodes z and q.
    Returns [D,R,K,2] in the dtype of v: sum_n v_n / (z_k - q_k w_n) + conj(v_n) / (z_k - q_k conj(w_n)). Sums are in
    float32 or float64 as the inputs are, in float64 with Triton. A node on a pole gives inf or nan.
    Raises ShapeError, DtypeError, DeviceError, BackendError.
    """
    sizes = expect_shape("v", v, "D R N 2")
    sizes = expect_shape("w", w, "D N 2", sizes)
    sizes = expect_shape("z", z, "K 2", sizes)
    if q is not None:
        sizes = expect_shape("q", q, "K 2", sizes)
    if min(sizes["R"], sizes["N"]) == 0:
        raise ShapeError(f"v has shape {list(v.shape)}, wanted [D, R, N, 2] with at least one sum and one pole")
    for name, tensor in (("v", v), ("w", w), ("z", z), ("q", q)):
        if tensor is not None:
            expect_floating(name, tensor)
    expect_same_device(v, w=w, z=z, q=q)
    moving = torch.is_grad_enabled() and (z.requires_grad or (q is not None and q.requires_grad))
    facts = {"sums": sizes["R"], "nodes_move": moving, "empty": v.numel() == 0 or z.numel() == 0}
    fn = select("cauchy_kernel", backend, (v, w, z, q), facts)
    with without_autocast(v):
        y: Tensor = fn(v, w, z, q)
    return y


def flops(channels: int, sums: int, poles: int, nodes: int) -> int:
    """FLOPs of the product over poles, 2 per multiply-add: 8 D R N K (the matrix has 2N rows of 2K numbers)."""
    return 8 * channels * sums * poles * nodes


def _triton_refuses(sums: int, nodes_move: bool, empty: bool, **_: Any) -> str | None:
    if sums > MOST_SUMS:
        return f"takes up to R={MOST_SUMS} sums, v has {sums}"
    if nodes_move:
        return "has no gradient for the nodes z and q, and one requires it"
    return "there is no channel or no node" if empty else None


register_backend("cauchy_kernel", Serves("reference"), cauchy_reference, priority=REFERENCE)
register_backend("cauchy_kernel", Serves("chunked"), cauchy_chunked, priority=PLAIN)
register_backend(
    "cauchy_kernel",
    Serves("triton", devices=("cuda",), dtypes=("float64", "float32"), needs=("triton",)),
    cauchy_triton,
    refuses=_triton_refuses,
    priority=KERNEL,
)

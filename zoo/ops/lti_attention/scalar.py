"""LTI attention with heads of one channel: <q, k> v is a product of numbers, so gates around a diagonal scan do it."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.lti import lti_scan
from zoo.ops.lti_attention.gates import gate


def gated_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    c: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y = q scan(k v): shapes as in `lti_attention` with P = 1; y in the dtype of q, k and v.

    backend: of `lti_scan`; with "triton", gates are kernels too.
    """
    product = gate if backend == "triton" else torch.mul
    y, final = lti_scan(
        product(k.squeeze(-1), v.squeeze(-1)),
        log_a,
        c,
        D=D,
        initial_state=None if initial_state is None else initial_state.flatten(-3),
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return product(q.squeeze(-1), y).unsqueeze(-1), final[..., None, None]

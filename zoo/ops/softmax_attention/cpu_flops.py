"""FLOP formulas of torch's fused attention on a CPU, which its own FLOP counter has none for (it would read 0)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from zoo.ops.custom import flop_formula


def forward_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """Shapes [B,H,T,P] of q, [B,G,K,P] of k, [B,G,K,Pv] of v: two products over the whole matrix, causal or not."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def backward_flops(dy: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """The scores again, and two products each for the gradients of the scores' inputs and of v and the weights."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


FORMULAS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": forward_flops,
    "_scaled_dot_product_flash_attention_for_cpu_backward": backward_flops,
}

for name, formula in FORMULAS.items():
    operator = getattr(torch.ops.aten, name, None)
    if operator is not None:
        flop_formula(operator)(formula)

"""Taps of a shift state space (Fu et al. 2023, H3) for a step that decodes: no transforms, no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.custom import refuse_higher_order


@torch.library.custom_op("zoo::shift_taps", mutates_args=())
def shift_taps(B: Tensor, C: Tensor, skip: Tensor) -> Tensor:
    """K_j = sum_m B_m C_{m+j} (+ skip at j = 0) as weights of `short_convolution_step`: float32 [D,W], K_0 last.

    B, C: [D,W]. skip: [D]. Of any floating dtype; products and sums are float32, in one Triton kernel.
    """
    from zoo.ops.short_convolution.kernels.shift import launch

    return launch(B, C, skip)


@shift_taps.register_fake
def _(B: Tensor, C: Tensor, skip: Tensor) -> Tensor:
    return B.new_empty(B.shape, dtype=torch.float32)


refuse_higher_order(shift_taps, "short_convolution_step", has_gradient=True)

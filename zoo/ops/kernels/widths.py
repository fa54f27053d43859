"""Widths that kernels of half precision are given: multiples of 16 channels, zeros behind the real ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MULTIPLE = 16  # Triton 3.6 miscompiles tiles of other constant widths for Hopper: wrong sums, stray accesses


def whole_width(tensor: Tensor) -> Tensor:
    """The tensor, its last axis filled up with zeros to a multiple of 16 if it is bfloat16 or float16."""
    missing = -tensor.shape[-1] % MULTIPLE if tensor.element_size() == 2 else 0
    return F.pad(tensor, (0, missing)) if missing else tensor


def cut_width(tensor: Tensor, width: int) -> Tensor:
    """The first `width` channels of the last axis, contiguous if some are cut off; the tensor itself if none are."""
    return tensor if tensor.shape[-1] == width else tensor[..., :width].contiguous()

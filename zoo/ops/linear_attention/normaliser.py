"""The normaliser of linear attention: a column of ones beside the values, whose sum divides the others."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def with_ones(v: Tensor, normalize: bool) -> Tensor:
    """[..., P] -> [..., P+1] with 1 in the last column, if `normalize`."""
    return F.pad(v, (0, 1), value=1.0) if normalize else v


def finish(sums: Tensor, normalize: bool, eps: float, scale: float) -> Tensor:
    """y [..., P] from sums [..., P(+1)] of unscaled products: scale num / (scale den + eps), or scale num."""
    sums = sums if scale == 1.0 else sums * scale
    return sums[..., :-1] / (sums[..., -1:] + eps) if normalize else sums

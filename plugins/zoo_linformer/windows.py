"""Projection along the length by windows side by side: their means, their maxima, or their products with taps."""

from __future__ import annotations

import torch
from torch import Tensor


def windows_of(x: Tensor, window: int) -> Tensor:
    """x [B,T,G,P] -> [B,R,window,G,P], the last window filled up with zeros; R = ceil(T / window)."""
    batch, tokens, groups, width = x.shape
    missing = -tokens % window
    if missing:
        x = torch.cat([x, x.new_zeros(batch, missing, groups, width)], 1)
    return x.view(batch, -1, window, groups, width)


def real_slots(lengths: Tensor, tokens: int, window: int) -> Tensor:
    """Slots of the windows that hold real tokens, bool [B,R,window]; lengths int64 [B], real tokens of each row."""
    places = torch.arange(-(-tokens // window) * window, device=lengths.device)
    return (places < lengths[:, None]).view(lengths.shape[0], -1, window)


def mean_pool(x: Tensor, real: Tensor) -> Tensor:
    """Mean over the real tokens of each window; 0 where there are none.

    x: [B,R,W,G,P], 0 at the other slots. real: bool [B,R,W]. Returns [B,R,G,P].
    """
    counts = real.sum(2).clamp(min=1)
    return (x.sum(2) / counts[:, :, None, None]).to(x.dtype)  # autocast on CUDA sums in float32


def max_pool(x: Tensor, real: Tensor) -> Tensor:
    """Maximum over the real tokens of each window, channel by channel; 0 where there are none.

    Arguments and result as those of `mean_pool`.
    """
    largest = torch.where(real[..., None, None], x, torch.finfo(x.dtype).min).amax(2)
    return torch.where(real.any(2)[:, :, None, None], largest, 0)


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """Sum over each window, weighted by taps [W], or [G,W] for taps of each head. x: [B,R,W,G,P]. Returns [B,R,G,P]."""
    if taps.dim() == 2:
        return torch.einsum("gw,brwgp->brgp", taps, x)
    flat = x.flatten(0, 1).flatten(2)  # [B R, W, G P]
    return torch.bmm(taps.expand(flat.shape[0], 1, -1), flat).view(*x.shape[:2], *x.shape[3:])

"""Padding as packing: a padded batch becomes one packed row of fixed shape, and comes back."""

from __future__ import annotations

import torch
from torch import Tensor


class PaddingAsPacking:
    """Moves the real tokens of a padded batch [B,T,...] into one packed row [1,B*T,...] and back.

    Real tokens keep their order, row by row; the padded slots follow as one more sequence, of zeros. So the packed
    row has S = B + 1 sequences, shapes do not depend on the mask's values (torch.compile(fullgraph=True) works), and
    whatever a mixer does right for `cu_seqlens` it does right for padding.
    """

    def __init__(self, padding_mask: Tensor) -> None:
        """padding_mask: bool [B,T], True = real."""
        self.real = padding_mask
        self.batch, self.tokens = padding_mask.shape
        flat = padding_mask.reshape(-1)
        self.order = torch.argsort((~flat).to(torch.int32), stable=True)  # packed position -> flat slot
        self.back = torch.argsort(self.order)
        lengths = padding_mask.sum(1)
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0), lengths.new_full((1,), flat.numel())])
        self.cu_seqlens = ends  # int64 [B+2]

    def pack(self, x: Tensor) -> Tensor:
        """[B,T,...] -> [1,B*T,...]; what stood in padded slots (NaN too) becomes 0."""
        real = self.real.reshape(self.batch, self.tokens, *[1] * (x.dim() - 2))
        clean = torch.where(real, x, torch.zeros((), dtype=x.dtype, device=x.device))
        return clean.flatten(0, 1).index_select(0, self.order).unsqueeze(0)

    def unpack(self, y: Tensor) -> Tensor:
        """[1,B*T,...] -> [B,T,...] with 0 in padded slots."""
        rows = y.squeeze(0).index_select(0, self.back).reshape(self.batch, self.tokens, *y.shape[2:])
        real = self.real.reshape(self.batch, self.tokens, *[1] * (rows.dim() - 2))
        return torch.where(real, rows, torch.zeros((), dtype=y.dtype, device=y.device))

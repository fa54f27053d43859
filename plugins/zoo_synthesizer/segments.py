"""Which tokens of a call belong together, and where each stands in its sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Pieces of packed sequences: every token belongs to one, and the real ones to a row of the state.

    cu_seqlens: int64 [M+1], boundaries. rows: int64 [M], row of the state each piece extends, -1 for padding.
    """

    cu_seqlens: Tensor
    rows: Tensor

    def positions(self, total: int, past: Tensor | None = None) -> Tensor:
        """Position of each of `total` tokens in its sequence, int64 [1,total]; past: int64 [rows], tokens before it."""
        index = torch.arange(total, device=self.rows.device)
        piece = torch.searchsorted(self.cu_seqlens[1:], index, right=True).clamp(max=self.rows.shape[0] - 1)
        own = index - self.cu_seqlens[piece]
        if past is not None:
            before = torch.where(self.rows >= 0, past[self.rows.clamp(min=0)], 0)
            own = own + before[piece]
        return own.unsqueeze(0)


def packed_segments(cu_seqlens: Tensor) -> Segments:
    """Every sequence is a piece. cu_seqlens: int [S+1]."""
    ends = cu_seqlens.to(torch.int64)
    return Segments(ends, torch.arange(ends.shape[0] - 1, device=ends.device))


def padded_segments(padding_mask: Tensor) -> Segments:
    """The rows of a padded batch bool [B,T] behind one another: padding on the left, real tokens, padding on the right.

    No piece is longer than T, and shapes do not depend on the values of the mask.
    """
    batch, tokens = padding_mask.shape
    row = torch.arange(batch, device=padding_mask.device)
    first, length = padding_mask.to(torch.int32).argmax(1), padding_mask.sum(1)
    begin = row * tokens
    ends = torch.stack([begin + first, begin + first + length, begin + tokens], 1).flatten()
    nobody = torch.full_like(row, -1)
    return Segments(torch.cat([ends.new_zeros(1), ends]), torch.stack([nobody, row, nobody], 1).flatten())

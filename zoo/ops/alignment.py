"""Padded rows with their real tokens moved to the front, for operators that count positions of real tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def real_spans(padding_mask: Tensor) -> Tensor:
    """First real token and number of real tokens of each row of padding_mask bool [B,T], T >= 1: int64 [B,2]."""
    return torch.stack([padding_mask.to(torch.int32).argmax(1), padding_mask.sum(1)], 1)


class RealFirst:
    """Turns each row [T,...] until its real tokens, one contiguous run, stand at the front, and back.

    Shapes do not depend on the mask's values. A turn is a permutation, so gradients do not depend on the order of sums.
    """

    def __init__(self, padding_mask: Tensor) -> None:
        """padding_mask: bool [B,T], T >= 1, True = real."""
        self.mask = padding_mask
        batch, tokens = padding_mask.shape
        spans = real_spans(padding_mask)
        place = torch.arange(tokens, device=padding_mask.device)
        row = torch.arange(batch, device=padding_mask.device)[:, None] * tokens
        self.lengths = spans[:, 1]  # int64 [B]
        self.real = place < spans[:, 1:]  # bool [B,T], True at the real tokens after the turn
        self._to_front = (row + (place + spans[:, :1]) % tokens).flatten()
        self._back = (row + (place - spans[:, :1]) % tokens).flatten()

    def turn(self, x: Tensor) -> Tensor:
        """x [B,T,...] with the real tokens of each row at the front and 0 behind them, whatever stood there."""
        return torch.where(_wide(self.real, x), _pick(x, self._to_front), 0)

    def turn_back(self, y: Tensor) -> Tensor:
        """The other way: y [B,T,...] with its tokens where the mask has them, 0 at padded slots."""
        return torch.where(_wide(self.mask, y), _pick(y, self._back), 0)


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    """mask [B,T] with axes of size 1 behind, as many as `like` has."""
    return mask.reshape(*mask.shape, *[1] * (like.dim() - 2))


def _pick(x: Tensor, flat: Tensor) -> Tensor:
    """Slots `flat` int64 [B T] of x [B,T,...], counted over the whole batch."""
    return x.flatten(0, 1).index_select(0, flat).view(x.shape)

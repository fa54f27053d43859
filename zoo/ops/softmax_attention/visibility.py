"""Which keys a query sees, as a boolean mask built from positions; no value leaves the device."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(
    rows: Tensor,
    cols: Tensor,
    *,
    offset: int,
    causal: bool,
    padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor | None:
    """Mask of some queries and some keys, bool, broadcastable to [B,1,t,K]; None if every query sees every key.

    rows: int64 [t], indices of the queries. cols: int64 [K], indices of the keys, from 0.
    offset: Tk - Tq. padding_mask: bool [B,>=K]. cu_seqlens, cu_seqlens_k: int [S+1], both or none.
    """
    sees: Tensor | None = None
    if cu_seqlens is not None and cu_seqlens_k is not None:
        row_sequence, row_left = _sequence_and_rest(rows, cu_seqlens)
        col_sequence, col_left = _sequence_and_rest(cols, cu_seqlens_k)
        sees = row_sequence[:, None] == col_sequence
        if causal:  # both count from the end of their sequence
            sees = sees & (col_left >= row_left[:, None])
    elif causal:
        sees = cols <= rows[:, None] + offset
    if padding_mask is not None:
        real = padding_mask[:, None, None, : cols.shape[0]]
        sees = real if sees is None else sees & real
    return sees


def clear_padding(tensor: Tensor, padding_mask: Tensor) -> Tensor:
    """tensor [B,T,H,P] with 0 where padding_mask bool [B,T] is False; NaN there is harmless, in gradients too."""
    return torch.where(padding_mask[:, :, None, None], tensor, 0)


def _sequence_and_rest(index: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence each packed token belongs to, and how many tokens of it follow; int64 each, shape of `index`."""
    ends = cu_seqlens[1:].to(torch.int64)
    sequence = torch.searchsorted(ends, index, right=True).clamp(max=ends.shape[0] - 1)
    return sequence, ends[sequence] - 1 - index

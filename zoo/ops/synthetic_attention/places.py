"""Where queries and keys stand in their sequences, and rows of a learned tensor by position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding


class Places(NamedTuple):
    """Positions of the queries and keys of a call.

    first: position of the first query, if all rows are alike and unpacked; keys are then at 0, 1, ..., and the tensors
        None.
    queries: int64 [b,Tq], b = 1 or B. keys: int64 [Tk]. q_sequence: int64 [Tq], k_sequence: int64 [Tk], or None.
    """

    first: int | None
    queries: Tensor | None = None
    keys: Tensor | None = None
    q_sequence: Tensor | None = None
    k_sequence: Tensor | None = None


def places(
    queries: int, keys: int, past: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None
) -> Places:
    """Positions by the rules of `synthetic_attention`, from sizes and boundaries; no value leaves the device."""
    if cu_seqlens is not None and cu_seqlens_k is not None:
        device = cu_seqlens.device
        q_ends, k_ends = cu_seqlens.to(torch.int64), cu_seqlens_k.to(torch.int64)
        q_sequence, q_own = _sequence_and_index(torch.arange(queries, device=device), q_ends)
        k_sequence, k_own = _sequence_and_index(torch.arange(keys, device=device), k_ends)
        before = k_ends.diff() - q_ends.diff()
        return Places(None, (q_own + before[q_sequence]).unsqueeze(0), k_own, q_sequence, k_sequence)
    if past is None:
        return Places(keys - queries)
    index = torch.arange(queries, device=past.device)
    return Places(None, past.to(torch.int64).unsqueeze(1) + index, torch.arange(keys, device=past.device))


def rows_at(table: Tensor, positions: Tensor) -> Tensor:
    """Rows of `table` [L,...] at positions int64 [...], clamped to those there are: [*positions.shape, ...].

    The gradient adds up rows in a fixed order on every device, which that of plain indexing does not promise.
    """
    flat = table.flatten(1)
    found: Tensor = embedding(positions.clamp(0, table.shape[0] - 1), flat)
    return found.reshape(*positions.shape, *table.shape[1:])


def _sequence_and_index(index: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence each packed token belongs to, and its index there; int64 each."""
    sequence = torch.searchsorted(ends[1:], index, right=True).clamp(max=ends.shape[0] - 2)
    return sequence, index - ends[sequence]

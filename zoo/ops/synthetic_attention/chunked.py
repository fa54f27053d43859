"""Synthetic attention in plain PyTorch, one block of queries at a time: memory grows with Tk, not with Tq Tk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.synthetic_attention.parts import Parts
from zoo.ops.synthetic_attention.places import Places, places, rows_at

BLOCK = 128


def synthetic_attention_chunked(
    parts: Parts,
    v: Tensor,
    *,
    queries: int,
    past: Tensor | None,
    causal: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block: int = BLOCK,
) -> Tensor:
    """Arguments and result of `synthetic_attention`. block: queries per step, > 0.

    Dot operands have the dtype of v, logits and statistics the accumulation dtype. In eager training each block is
    computed again in the backward, so that its weights are not kept. Packed sequences are run one after the other in
    eager mode, and behind a mask under torch.compile, which may not look at their boundaries.
    """
    with torch.autocast(v.device.type, enabled=False):
        if cu_seqlens is not None and cu_seqlens_k is not None and not torch.compiler.is_compiling():
            options = {"causal": causal, "past": None, "cu_seqlens": None, "cu_seqlens_k": None, "block": block}
            return _each_sequence(parts, v, cu_seqlens.tolist(), cu_seqlens_k.tolist(), options)
        keys = v.shape[1]
        at = places(queries, keys, past, cu_seqlens, cu_seqlens_k)
        again = torch.is_grad_enabled() and queries > block and not torch.compiler.is_compiling()
        pieces = []
        for start in range(0, max(queries, 1), block):
            stop = min(start + block, queries)
            seen = keys
            if causal and at.first is not None:
                seen = min(keys, max(0, stop + at.first))
            cut = parts.of_queries(slice(start, stop)).of_keys(slice(0, seen))
            operands = (cut, v[:, :seen], _some(at, start, stop), stop - start, causal)
            if again:
                pieces.append(checkpoint(_attend, *operands, use_reentrant=False, preserve_rng_state=False))
            else:
                pieces.append(_attend(*operands))
        return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def _each_sequence(parts: Parts, v: Tensor, q_ends: list[int], k_ends: list[int], options: dict[str, Any]) -> Tensor:
    pieces = []
    for s in range(len(q_ends) - 1):
        rows, cols = slice(q_ends[s], q_ends[s + 1]), slice(k_ends[s], k_ends[s + 1])
        if rows.stop > rows.start:
            own = parts.of_queries(rows).of_keys(cols)
            pieces.append(synthetic_attention_chunked(own, v[:, cols], queries=rows.stop - rows.start, **options))
    return torch.cat(pieces, 1) if pieces else v.new_zeros(1, 0, *v.shape[2:])


def _some(at: Places, start: int, stop: int) -> Places:
    """The places of some queries and of all keys."""
    if at.queries is None:
        assert at.first is not None
        return Places(at.first + start)
    sequence = None if at.q_sequence is None else at.q_sequence[start:stop]
    return at._replace(queries=at.queries[:, start:stop], q_sequence=sequence)


def _attend(parts: Parts, v: Tensor, at: Places, queries: int, causal: bool) -> Tensor:
    """Full rows of a few queries over v [B,K,H,P]: [B,t,H,P]."""
    wide = accumulation_dtype(v.dtype)
    logits = _logits(parts, v, at, queries)
    sees = _sees(at, queries, v.shape[1], causal, v.device)
    if sees is not None:
        logits = torch.where(sees, logits, torch.finfo(wide).min)
    weights = logits.softmax(-1)
    if sees is not None:
        weights = torch.where(sees, weights, 0)
    weights = weights.expand(v.shape[0], *weights.shape[1:]).to(v.dtype).to(wide)
    return torch.einsum("bhij,bjhp->bihp", weights, v.to(wide)).to(v.dtype)


def _logits(parts: Parts, v: Tensor, at: Places, queries: int) -> Tensor:
    """Sum of the parts for a few queries, accumulation dtype [B or 1,H,t,K]."""
    keys, wide = v.shape[1], accumulation_dtype(v.dtype)
    terms: list[Tensor] = []
    if parts.q is not None and parts.k is not None:
        terms.append(torch.einsum("bihn,bjhn->bhij", parts.q.to(wide), parts.k.to(wide)))
    if parts.table is not None:
        terms.append(_table_part(parts.table, at, queries, keys).to(wide))
    if parts.left is not None and parts.right is not None:
        product = (parts.left.to(wide).unsqueeze(-1) * parts.right.to(wide).unsqueeze(-2)).flatten(-2)  # [B,t,H,a b]
        if at.keys is not None and at.k_sequence is not None:
            product = rows_at(product.movedim(-1, 0), at.keys).movedim(0, -1)
        terms.append(product[..., :keys].transpose(1, 2))
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _table_part(table: Tensor, at: Places, queries: int, keys: int) -> Tensor:
    """The table [H,Lq,Lk] at the positions of a few queries and all keys: [b,H,t,K], b = 1 or B."""
    if at.queries is None:
        assert at.first is not None
        if at.first >= 0:
            return table[None, :, at.first : at.first + queries, :keys]
        rows = torch.arange(at.first, at.first + queries, device=table.device).unsqueeze(0)
    else:
        rows = at.queries
    found = rows_at(table.transpose(0, 1), rows).transpose(1, 2)  # [b,H,t,Lk]
    if at.keys is not None and at.k_sequence is not None:
        found = rows_at(found.movedim(-1, 0), at.keys).movedim(0, -1)
    return found[..., :keys]


def _sees(at: Places, queries: int, keys: int, causal: bool, device: torch.device) -> Tensor | None:
    """Mask of a few queries and all keys, bool, broadcastable to [B,1,t,K]; None if all is seen."""
    if at.queries is None:
        assert at.first is not None
        if not causal or (at.first >= 0 and queries == 1):
            return None
        position = torch.arange(at.first, at.first + queries, device=device)
        return torch.arange(keys, device=device) <= position.unsqueeze(1)
    assert at.keys is not None
    sees = at.keys <= at.queries[:, None, :, None] if causal else None
    if at.q_sequence is None or at.k_sequence is None:
        return sees
    same = at.q_sequence.unsqueeze(1) == at.k_sequence
    return same if sees is None else sees & same

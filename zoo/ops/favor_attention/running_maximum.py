"""Causal FAVOR+ attention in chunks: every sum is scaled by a maximum that only its own past has made.

A weight exp(log_q_ir + log_k_jr) is the product of exp(log_q_ir + point_r - highest_i) and exp(log_k_jr - point_r).
`point` is the maximum over the keys before the chunk and its first one, `highest_i` the largest log_q_ir + point_r. The
first factor is at most 1, the second at most exp(LIMIT) for as long as no key of the chunk outgrows `point` by more; a
product that underflows is below exp(-47) of its row's sum. Rows after such a key are formed by `outgrown`, whose scales
follow the running maximum. Which form serves a row is decided by its own past, so no bit of it knows of later tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.favor_attention.features import empty_maximum, half_square, projected, quotient
from zoo.ops.favor_attention.outgrown import LIMIT, outgrown_rows
from zoo.ops.linear_attention.channel_decay import enter
from zoo.ops.linear_attention.feature_map import for_every_head
from zoo.ops.semiseparable.chunked import BLOCK, Layout, packed_in_chunks, rows_in_chunks
from zoo.ops.semiseparable.cost import CHUNK


def scan_exponentials(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    projection: Tensor,
    features: str,
    padding_mask: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """q [B,T,H,N], k [B,T,G,N], values [B,T,H,P+1] (a 1 last), initial_state [S,H,M,P+2]; T >= 1.

    values and initial_state are in the accumulation dtype. Returns y [B,T,H,P] and the final state [S,H,M,P+2], in it.
    """
    heads = q.shape[2]
    if cu_seqlens is None:
        layout = rows_in_chunks(values, min(CHUNK, values.shape[1]))
    else:
        layout = packed_in_chunks(values, cu_seqlens)
    # letters: R rows, C chunks, K tokens of a chunk
    q_RCHKN, k_RCGKN, v_RCHKP = (layout.split(part).movedim(3, 2).contiguous() for part in (q, k, values))
    real = real_places(layout, padding_mask, values)
    below = half_square(k_RCGKN)
    if real is not None:
        below = below.masked_fill(~real, torch.inf)
    q_RCHKM = projected(q_RCHKN, projection, features)
    k_RCHKM = for_every_head(projected(k_RCGKN, projection, features).sub_(below), heads)
    inside = k_RCHKM.detach().amax(-2).clamp(min=empty_maximum(values.dtype))
    entering_top = enter_maxima(inside, initial_state, layout)  # [R,C,H,M]
    leaving_top = torch.maximum(entering_top, inside)
    point = torch.maximum(entering_top, first_key(k_RCHKM.detach(), real))  # [R,C,H,M]

    # in place: none of these is kept for the backward before its exponential
    late = k_RCHKM - point.unsqueeze(-2)
    growth = late.detach().amax(-1, keepdim=True)  # [R,C,H,K,1]
    phi_k = late.sub_(torch.where(growth > LIMIT, torch.inf, 0.0)).exp_()
    logits = q_RCHKM + point.unsqueeze(-2)
    highest = logits.detach().amax(-1, keepdim=True)
    phi_q = logits.sub_(highest).exp_()
    added = (k_RCHKM - leaving_top.unsqueeze(-2)).exp_().mT @ v_RCHKP  # [R,C,H,M,P+1]
    entering = enter_sums(added, entering_top, leaving_top, point, initial_state, layout)  # [R,C,H,M,P+1]
    sums = (phi_q @ phi_k.mT).tril() @ v_RCHKP + phi_q @ entering

    outgrown = growth.cummax(-2).values > LIMIT
    their_sums, their_highest = outgrown_rows(q_RCHKM, k_RCHKM, v_RCHKP, entering, point, outgrown)
    sums = torch.where(outgrown, their_sums, sums)
    if eps:
        highest = torch.where(outgrown, their_highest, highest) - half_square(q_RCHKN)
    y = layout.join(quotient(sums, highest, point.shape[-1], eps).movedim(3, 2))

    kept = layout.last(point - leaving_top).exp().unsqueeze(-1)
    final = kept * layout.last(entering) + layout.last(added)
    final = torch.cat([final, layout.last(leaving_top).unsqueeze(-1)], -1)
    if layout.empty is not None:
        if initial_state is None:
            initial_state = empty_state(values[..., 1:], heads, point.shape[-1], cu_seqlens)
        final = torch.where(layout.empty[:, None, None, None], initial_state, final)
    return y, final


def real_places(layout: Layout, padding_mask: Tensor | None, values: Tensor) -> Tensor | None:
    """Places with a token that is not padding, bool [R,C,1,K,1]; None if all are."""
    if padding_mask is None and layout.place is None and layout.chunks * layout.chunk == layout.tokens:
        return None
    tokens = torch.ones_like(values[:1, :, 0, 0]) if padding_mask is None else padding_mask.to(values.dtype)
    return layout.split(tokens).gt(0)[:, :, None, :, None]


def first_key(log_k: Tensor, real: Tensor | None) -> Tensor:
    """The first real key of each chunk, [R,C,H,M], of log_k [R,C,H,K,M]; without one, the first place."""
    if real is None:
        return log_k[..., 0, :]
    place = real.int().argmax(-2, keepdim=True).expand(*log_k.shape[:3], 1, log_k.shape[-1])
    return log_k.gather(-2, place).squeeze(-2)


def enter_sums(
    added: Tensor, entering_top: Tensor, leaving_top: Tensor, point: Tensor, initial: Tensor | None, layout: Layout
) -> Tensor:
    """Sums over all keys before each chunk, times exp(-point), [R,C,H,M,P+1].

    added: those over its own keys, times exp(-leaving_top). initial: the initial states [S,H,M,P+2], or None.
    entering_top, leaving_top, point: [R,C,H,M].
    """
    if layout.chunks > 2 * BLOCK:
        given = None if initial is None else initial[..., :-1]
        sums = enter(added, entering_top - leaving_top, given, layout)
        return sums * (entering_top - point).exp().unsqueeze(-1)
    order, part = torch.arange(layout.chunks, device=added.device), layout.starts.cumsum(0)
    before = (order < order.unsqueeze(-1)) & (part == part.unsqueeze(-1))  # [C,C]
    left, read = (part.movedim(1, 3).contiguous() for part in (leaving_top, point))  # [R,H,M,C]
    scales = left.unsqueeze(-2) - read.unsqueeze(-1)
    sums = (scales.masked_fill_(~before, -torch.inf).exp_() @ added.movedim(1, 3)).movedim(3, 1)
    if initial is None:
        return sums
    given = by_chunk(initial, layout)
    return sums + given[..., :-1] * (given[..., -1] - point).exp().unsqueeze(-1)


def by_chunk(initial: Tensor, layout: Layout) -> Tensor:
    """What belongs to each sequence, [S,...], for its chunks: [R,C or 1,...]."""
    return initial.unsqueeze(1) if layout.sequence is None else initial[layout.sequence].unsqueeze(0)


def empty_state(v: Tensor, heads: int, count: int, cu_seqlens: Tensor | None) -> Tensor:
    """The state [S,H,M,P+2] before the first key, in the accumulation dtype."""
    inner = accumulation_dtype(v.dtype)
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    sums = v.new_zeros(sequences, heads, count, v.shape[-1] + 1, dtype=inner)
    return F.pad(sums, (0, 1), value=empty_maximum(inner))


def enter_maxima(tops: Tensor, initial: Tensor | None, layout: Layout) -> Tensor:
    """Maximum over all keys before each chunk, [R,C,H,M].

    tops: maximum inside each chunk, [R,C,H,M]. initial: the initial states [S,H,M,P+2], or None.
    """
    least = tops.new_full((), empty_maximum(tops.dtype))
    given = least if initial is None else by_chunk(initial[..., -1], layout)
    before = F.pad(tops[:, :-1], (0, 0, 0, 0, 1, 0))
    top = torch.where(layout.starts[:, None, None], given, before)
    part = layout.starts.cumsum(0)  # which sequence, counted over those with chunks
    step = 1
    while step < layout.chunks:
        linked = (part[step:] == part[:-step])[:, None, None]
        later = torch.where(linked, torch.maximum(top[:, step:], top[:, :-step]), top[:, step:])
        top = torch.cat([top[:, :step], later], 1)
        step *= 2
    return top

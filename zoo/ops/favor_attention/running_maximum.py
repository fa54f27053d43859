"""Causal FAVOR+ attention in chunks: every sum is scaled by a maximum that only its own past has made.

A weight exp(log_q_ir + log_k_jr) is the product of exp(log_q_ir + top_r - highest_i) and exp(log_k_jr - top_r), neither
above 1, where `top` is the maximum over the keys up to some point between j and i, and `highest_i` the largest logit of
row i. One point does not serve all pairs of a chunk: a chunk's last keys may outgrow its first by any factor. So the
points are the middles of halves, quarters, ... of the chunk; pairs inside the smallest parts are formed one by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.favor_attention.features import empty_maximum, quotient
from zoo.ops.linear_attention.channel_decay import enter
from zoo.ops.semiseparable.chunked import Layout, packed_in_chunks, rows_in_chunks, split_axis

CHUNK = 64
PART = 4  # tokens of a smallest part


def chunk_length(tokens: int) -> int:
    """CHUNK, or the least PART * 2^n that holds all tokens."""
    length = PART
    while length < min(tokens, CHUNK):
        length *= 2
    return length


def scan_exponentials(
    log_q: Tensor,
    log_k: Tensor,
    values: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """log_q, log_k [B,T,H,M], values [B,T,H,P+1] (a 1 last), initial_state [S,H,M,P+2]; one dtype, T >= 1.

    Keys that are masked out have logarithms of -inf. Returns y [B,T,H,P] and the final state [S,H,M,P+2].
    """
    tokens = values.shape[1]
    length = chunk_length(tokens)
    layout = rows_in_chunks(values, length) if cu_seqlens is None else packed_in_chunks(values, cu_seqlens)
    real = layout.split(torch.ones_like(values[:1, :, :1, :1])) > 0  # [1,C,K,1,1]
    # letters: R rows, C chunks, K tokens of a chunk
    k_RCHKM = by_head(layout.split(log_k).masked_fill(~real, -torch.inf), length, -torch.inf)
    q_RCHKM, v_RCHKP = (by_head(layout.split(part), length, 0.0) for part in (log_q, values))
    inside = k_RCHKM.detach().cummax(-2).values.clamp(min=empty_maximum(values.dtype))
    entering_top = enter_maxima(inside[..., -1, :], initial_state[..., -1], layout)  # [R,C,H,M]
    running = torch.maximum(inside, entering_top.unsqueeze(-2))
    leaving_top = running[..., -1, :]
    highest = (q_RCHKM.detach() + running).amax(-1, keepdim=True)  # [R,C,H,K,1]

    added = (k_RCHKM - leaving_top.unsqueeze(-2)).exp().mT @ v_RCHKP  # [R,C,H,M,P+1]
    kept = entering_top - leaving_top
    entering = enter(added, kept, initial_state[..., :-1], layout)
    read = (q_RCHKM + entering_top.unsqueeze(-2) - highest).exp() @ entering
    read = read + inside_chunks(q_RCHKM, k_RCHKM, v_RCHKP, running, highest)
    y = quotient(read, highest, log_q.shape[-1], eps)
    y = layout.join(y.movedim(3, 2)[:, :, : layout.chunk])

    final = layout.last(kept).exp().unsqueeze(-1) * layout.last(entering) + layout.last(added)
    final = torch.cat([final, layout.last(leaving_top).unsqueeze(-1)], -1)
    if layout.empty is not None:
        final = torch.where(layout.empty[:, None, None, None], initial_state, final)
    return y, final


def by_head(part: Tensor, length: int, filling: float) -> Tensor:
    """[R,C,K,H,X] -> [R,C,H,K',X] with K' = `length` places, the last ones filled if there are fewer tokens."""
    part = part.movedim(3, 2)
    return F.pad(part, (0, 0, 0, length - part.shape[-2]), value=filling) if part.shape[-2] < length else part


def enter_maxima(tops: Tensor, initial: Tensor, layout: Layout) -> Tensor:
    """Maximum over all keys before each chunk, [R,C,H,M].

    tops: maximum inside each chunk, [R,C,H,M]. initial: that of the initial states, [S,H,M].
    """
    given = initial.unsqueeze(1) if layout.sequence is None else initial[layout.sequence].unsqueeze(0)
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


def inside_chunks(log_q: Tensor, log_k: Tensor, values: Tensor, running: Tensor, highest: Tensor) -> Tensor:
    """Sums of exp(log_q + log_k - highest) values over the keys of the own chunk up to the query.

    log_q, log_k, running [R,C,H,K,M], values [R,C,H,K,P+1], highest [R,C,H,K,1], K = PART * 2^n.
    running: maximum over all keys up to each one, the past of the chunk included.
    """
    tokens = values.shape[-2]

    def parts(part: Tensor, size: int) -> Tensor:
        return split_axis(part, -2, tokens // size)

    q, k = parts(log_q - highest, PART), parts(log_k, PART)
    later = torch.ones(PART, PART, dtype=torch.bool, device=q.device).triu(1).unsqueeze(-1)
    pairs = (q.unsqueeze(-2) + k.unsqueeze(-3)).masked_fill(later, -torch.inf)  # [R,C,H,K/4,4,4,M]
    total = (pairs.exp().sum(-1) @ parts(values, PART)).flatten(-3, -2)
    half = PART
    while half < tokens:
        middle = parts(running, 2 * half)[..., half - 1 : half, :]
        late = (parts(log_q - highest, 2 * half)[..., half:, :] + middle).exp()
        early = (parts(log_k, 2 * half)[..., :half, :] - middle).exp()
        part = (late @ early.mT) @ parts(values, 2 * half)[..., :half, :]
        total = total + F.pad(part, (0, 0, half, 0)).flatten(-3, -2)
        half *= 2
    return total

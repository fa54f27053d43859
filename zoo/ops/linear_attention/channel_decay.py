"""Linear attention with a decay for every key channel (gated linear attention), in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.semiseparable.chunked import (
    Layout,
    accumulate,
    packed_in_chunks,
    rows_in_chunks,
    transition,
)

CHUNK = 16  # decays between all pairs of a chunk's tokens are formed for every channel: [CHUNK, CHUNK, N]


def scan_channels(
    phi_q: Tensor,
    phi_k: Tensor,
    values: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + phi(k_t) v_t^T, read as phi(q_t)^T S_t.

    phi_q, phi_k, log_decay [B,T,H,N], values [B,T,H,P], initial_state [S,H,N,P]; all in the accumulation dtype.
    Returns what the queries read, [B,T,H,P], and the final state [S,H,N,P].
    The decay between two tokens of a chunk is the exponential of its own sum, which no decay can make overflow; the
    quotient exp(sum_i) / exp(sum_j) of the factored form can.
    Source: Yang et al. 2024 (gated linear attention), section 4.
    """
    batch, tokens, heads, width = phi_k.shape
    if tokens == 0:
        sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        empty = values.new_zeros(sequences, heads, width, values.shape[3])
        return values, empty if initial_state is None else initial_state.clone()
    if tokens == 1 and cu_seqlens is None:
        return one_token(phi_q, phi_k, values, log_decay, initial_state)
    if cu_seqlens is None:
        layout = rows_in_chunks(values, min(CHUNK, tokens))
    else:
        layout = divided(packed_in_chunks(values, cu_seqlens))
    # letters: R rows, C chunks, K tokens of a chunk
    q_RCHNK, k_RCHNK, a_RCHNK = (layout.split(part).movedim(2, 4) for part in (phi_q, phi_k, log_decay))
    v_RCHKP = layout.split(values).movedim(2, 3)
    within = transition(a_RCHNK)  # [R,C,H,N,K,K]
    reach = a_RCHNK.cumsum(-1)
    whole = reach[..., -1]  # [R,C,H,N] log decay over a whole chunk

    scores = (q_RCHNK.unsqueeze(-1) * within * k_RCHNK.unsqueeze(-2)).sum(3)  # [R,C,H,K,K]
    added = (k_RCHNK * within[..., -1, :]) @ v_RCHKP  # [R,C,H,N,P]
    entering = enter(added, whole, initial_state, layout)
    read = scores @ v_RCHKP + (q_RCHNK * reach.exp()).mT @ entering
    sums_read = layout.join(read.movedim(3, 2))

    final = layout.last(whole).exp().unsqueeze(-1) * layout.last(entering) + layout.last(added)
    if layout.empty is not None:
        kept = torch.zeros_like(final) if initial_state is None else initial_state
        final = torch.where(layout.empty[:, None, None, None], kept, final)
    return sums_read, final


def one_token(
    phi_q: Tensor, phi_k: Tensor, values: Tensor, log_decay: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`scan_channels` for T = 1, what decoding calls."""
    state = phi_k[:, 0].unsqueeze(-1) * values[:, 0].unsqueeze(-2)
    if initial_state is not None:
        state = state + initial_state * log_decay[:, 0].exp().unsqueeze(-1)
    return (phi_q[:, 0].unsqueeze(-2) @ state).movedim(2, 1), state


def divided(layout: Layout) -> Layout:
    """The same places in chunks of CHUNK tokens; chunks that CHUNK does not divide (a short packed row) stay whole.

    A sequence may now end in chunks without a token: nothing is added and nothing decays in those.
    """
    if layout.chunk % CHUNK:
        return layout
    parts = layout.chunk // CHUNK
    assert layout.sequence is not None
    assert layout.final is not None
    return Layout(
        chunk=CHUNK,
        chunks=layout.chunks * parts,
        tokens=layout.tokens,
        starts=F.pad(layout.starts.unsqueeze(-1), (0, parts - 1)).flatten(),
        sequence=layout.sequence.repeat_interleave(parts),
        place=layout.place,
        final=layout.final * parts + (parts - 1),
        empty=layout.empty,
    )


def enter(added: Tensor, whole: Tensor, states: Tensor | None, layout: Layout) -> Tensor:
    """State that enters each chunk, [R,C,H,N,P].

    added: what each chunk adds, [R,C,H,N,P]. whole: log decay over each chunk, [R,C,H,N].
    states: initial states [S,H,N,P], or None for zeros.
    """
    starts = layout.starts[:, None, None]
    before = F.pad(added[:, :-1], (0, 0) * 3 + (1, 0))
    if states is None:
        given = torch.zeros_like(before)
    elif layout.sequence is None:
        given = states.unsqueeze(1)
    else:
        given = states[layout.sequence].unsqueeze(0)
    fed = torch.where(starts.unsqueeze(-1), given, before)
    kept = F.pad(whole[:, :-1], (0, 0) * 2 + (1, 0)).masked_fill(starts, -torch.inf)
    return accumulate(fed.movedim(1, 3), kept.movedim(1, 3)).movedim(3, 1)

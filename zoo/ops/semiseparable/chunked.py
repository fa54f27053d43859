"""The semiseparable scan in plain PyTorch: matrix products inside chunks, a scan of states over chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.semiseparable.cost import CHUNK
from zoo.ops.semiseparable.recurrence import one_token

BLOCK = 16  # chunk states combined by one matrix product of the scan over chunks


def semiseparable_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `semiseparable`; y is rounded to the dtype of v."""
    y, final_state = scan(q, k, v, log_decay, scale, initial_state, cu_seqlens)
    return y.to(v.dtype), final_state


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `semiseparable`; y stays in the accumulation dtype, for a caller that adds to it before rounding.

    Source: Dao & Gu 2024, Listing 1; here every sequence of a packed row starts a chunk of its own.
    """
    inner = accumulation_dtype(v.dtype)
    batch, tokens, heads, channels = v.shape
    groups, width = q.shape[2:]
    if tokens == 0 or batch == 0:
        sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        empty = v.new_zeros(sequences, heads, channels, width, dtype=inner)
        return v.to(inner), empty if initial_state is None else initial_state.clone()
    if tokens == 1 and cu_seqlens is None:
        return one_token(q, k, v, log_decay, scale, initial_state)
    layout = rows_in_chunks(v, min(CHUNK, tokens)) if cu_seqlens is None else packed_in_chunks(v, cu_seqlens)
    values = v.to(inner) if scale is None else v.to(inner) * scale.unsqueeze(-1)
    # letters: R rows, C chunks, G groups, J heads of a group, K tokens of a chunk
    q_RCGKN, k_RCGKN = (layout.split(part.to(inner)).movedim(2, 3) for part in (q, k))
    v_RCGJKP = split_axis(layout.split(values), 3, groups).movedim(2, 4)
    if log_decay is None:
        a_RCGJK = values.new_zeros(1, 1, 1, 1, layout.chunk)
    else:
        a_RCGJK = split_axis(layout.split(log_decay), 3, groups).movedim(2, 4)
    within = transition(a_RCGJK)  # [R,C,G,J,K,K]
    reach = a_RCGJK.cumsum(-1)
    whole = reach[..., -1]  # [R,C,G,J] log decay over a whole chunk

    scores = (q_RCGKN @ k_RCGKN.mT).unsqueeze(3) * within
    y_RCGJKP = scores @ v_RCGJKP
    to_end = (v_RCGJKP * within[..., -1, :].unsqueeze(-1)).mT
    added = split_axis(to_end.flatten(3, 4) @ k_RCGKN, 3, -1, channels)  # [R,C,G,J,P,N]

    states = None
    if initial_state is not None:
        states = split_axis(initial_state, 1, groups)  # [S,G,J,P,N]
    whole = whole.expand(added.shape[:4])
    entering = enter(added, whole, states, layout)
    read = split_axis(entering.flatten(3, 4) @ q_RCGKN.mT, 3, -1, channels).mT
    y_RCGJKP = y_RCGJKP + read * reach.exp().unsqueeze(-1)
    y = layout.join(y_RCGJKP.movedim(4, 2).flatten(3, 4))

    final = layout.last(whole).exp()[..., None, None] * layout.last(entering) + layout.last(added)
    if layout.empty is not None:
        kept = torch.zeros_like(final) if states is None else states
        final = torch.where(layout.empty[:, None, None, None, None], kept, final)
    return y, final.flatten(1, 2)


def transition(log_decay: Tensor) -> Tensor:
    """Decay from j to i, product of the factors j+1..i: [..., K] -> lower triangular [..., K, K].

    Every entry is a sum of its own and not a difference of two, so large decays lose no digits, in the gradient
    neither, and -inf needs no care. What is above the diagonal is masked before the exponential.
    """
    steps = torch.arange(log_decay.shape[-1], device=log_decay.device)
    later = steps > steps.unsqueeze(-1)  # [j, i]
    sums = torch.where(later, log_decay.unsqueeze(-2), 0.0).cumsum(-1)
    return sums.masked_fill(steps < steps.unsqueeze(-1), -torch.inf).exp().mT


def accumulate(added: Tensor, log_decay: Tensor) -> Tensor:
    """e_c = exp(log_decay_c) e_{c-1} + added_c along the second to last axis. added [..., C, F], log_decay [..., C]."""
    steps = added.shape[-2]
    if steps <= 2 * BLOCK:
        return transition(log_decay) @ added
    blocks = -(-steps // BLOCK)
    added = split_axis(F.pad(added, (0, 0, 0, blocks * BLOCK - steps)), -2, blocks)
    log_decay = split_axis(F.pad(log_decay, (0, blocks * BLOCK - steps)), -1, blocks)
    inside = transition(log_decay) @ added
    reach = log_decay.cumsum(-1)
    leaving = accumulate(inside[..., -1, :], reach[..., -1])
    entering = F.pad(leaving[..., :-1, :], (0, 0, 1, 0))
    total = inside + reach.exp().unsqueeze(-1) * entering.unsqueeze(-2)
    return total.flatten(-3, -2)[..., :steps, :]


@dataclass(frozen=True)
class Layout:
    """How tokens [B,T,...] lie in chunks [R,C,K,...].

    chunk: tokens of a chunk, K. chunks: C. tokens: T.
    starts: bool [C], chunks that begin a sequence. sequence: int64 [C], which one, or None if it is the row.
    place: int64 [T], position of each token of a packed row among the C K places; None if rows are only padded.
    final: int64 [S], last chunk of each packed sequence. empty: bool [S], packed sequences without a token.
    """

    chunk: int
    chunks: int
    tokens: int
    starts: Tensor
    sequence: Tensor | None = None
    place: Tensor | None = None
    final: Tensor | None = None
    empty: Tensor | None = None

    def split(self, part: Tensor) -> Tensor:
        """[B,T,...] -> [R,C,K,...], zeros in the places without a token."""
        places = self.chunks * self.chunk
        if self.place is not None:
            part = part.new_zeros(1, places, *part.shape[2:]).index_copy(1, self.place, part)
        elif places > self.tokens:
            part = F.pad(part, (0, 0) * (part.dim() - 2) + (0, places - self.tokens))
        return split_axis(part, 1, self.chunks)

    def join(self, part: Tensor) -> Tensor:
        """[R,C,K,...] -> [B,T,...]."""
        part = part.flatten(1, 2)
        return part[:, : self.tokens] if self.place is None else part.index_select(1, self.place)

    def last(self, part: Tensor) -> Tensor:
        """[R,C,...] -> [S,...], the last chunk of each sequence."""
        return part[:, -1] if self.final is None else part[0].index_select(0, self.final)


def split_axis(part: Tensor, axis: int, outer: int, inner: int = -1) -> Tensor:
    """The axis becomes two, of sizes `outer` and `inner` (-1 for what remains)."""
    axis %= part.dim()
    return part.reshape(*part.shape[:axis], outer, inner, *part.shape[axis + 1 :])


def rows_in_chunks(v: Tensor, chunk: int) -> Layout:
    """Every row of the batch [B,T,...] is one sequence."""
    tokens = v.shape[1]
    chunks = -(-tokens // chunk)
    return Layout(chunk, chunks, tokens, torch.arange(chunks, device=v.device) == 0)


def packed_in_chunks(v: Tensor, cu_seqlens: Tensor, chunk: int = CHUNK) -> Layout:
    """Each of the S sequences of a packed row [1,T,...] begins a chunk. Shapes follow from T and S, not from values."""
    tokens, sequences, device = v.shape[1], cu_seqlens.numel() - 1, v.device
    chunk = min(chunk, tokens)
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    needed = (lengths + chunk - 1) // chunk
    ends = needed.cumsum(0)
    first = ends - needed
    time = torch.arange(tokens, device=device)
    owner = torch.searchsorted(bounds, time, right=True) - 1
    place = first[owner] * chunk + time - bounds[owner]
    chunks = (tokens + sequences * (chunk - 1)) // chunk
    index = torch.arange(chunks, device=device)
    sequence = torch.searchsorted(ends, index, right=True).clamp(max=sequences - 1)
    starts = index == first[sequence]
    return Layout(chunk, chunks, tokens, starts, sequence, place, (ends - 1).clamp(min=0), lengths == 0)


def enter(added: Tensor, whole: Tensor, states: Tensor | None, layout: Layout) -> Tensor:
    """State that enters each chunk, [R,C,G,J,P,N].

    added: what each chunk adds, [R,C,G,J,P,N]. whole: log decay over each chunk, [R,C,G,J].
    states: initial states, [R,G,J,P,N] or [S,G,J,P,N] if packed, or None for zeros.
    """
    starts = layout.starts[:, None, None]
    before = F.pad(added[:, :-1], (0, 0) * 4 + (1, 0))
    if states is None:
        given = torch.zeros_like(before)
    elif layout.sequence is None:
        given = states.unsqueeze(1)
    else:
        given = states[layout.sequence].unsqueeze(0)
    fed = torch.where(starts[..., None, None], given, before)
    kept = F.pad(whole[:, :-1], (0, 0) * 2 + (1, 0)).masked_fill(starts, -torch.inf)
    flat = accumulate(fed.flatten(4).movedim(1, 3), kept.movedim(1, 3))
    return flat.movedim(3, 1).reshape(fed.shape)

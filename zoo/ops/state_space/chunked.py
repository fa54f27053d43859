"""The state space scan in plain PyTorch: products inside chunks, states between them by doubling.

A chunk of Q tokens is one product with the Toeplitz tile of the first Q taps and one with the powers C A^1..C A^Q that
read the state before it; what it adds to the state is a product with A^(Q-1) B..B. States pass between chunks in
2 log2 steps, each a product with a power of A. Sequences of a packed row start chunks of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.semiseparable.chunked import Layout, packed_in_chunks, rows_in_chunks
from zoo.ops.semiseparable.cost import CHUNK


@dataclass(frozen=True)
class Powers:
    """What chunks of Q tokens need of one system, in its dtype.

    squares: A^1, A^2, A^4, ... up to the first power that is at least Q, [D,N,N] each. whole: A^Q.
    reads: C A^1 .. C A^Q, [D,Q,R,N]. feeds: A^(Q-1) B .. B, [D,N,Q]. taps: C B, C A B .. C A^(Q-1) B, [D,Q,R].
    """

    squares: list[Tensor]
    whole: Tensor
    reads: Tensor
    feeds: Tensor
    taps: Tensor


def powers_of(A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Powers:
    """By doubling: log2(chunk) squarings."""
    outputs = C.shape[1]
    squares, reads, feeds = [A], C @ A, B.unsqueeze(-1)  # [D,R,N] [D,N,1]
    while feeds.shape[2] < chunk:
        reads = torch.cat([reads, reads @ squares[-1]], 1)
        feeds = torch.cat([squares[-1] @ feeds, feeds], 2)
        squares.append(squares[-1] @ squares[-1])
    reads, feeds = reads[:, : chunk * outputs], feeds[..., -chunk:]
    taps = torch.cat([C, reads[:, : (chunk - 1) * outputs]], 1) @ B.unsqueeze(-1)
    whole: Tensor | None = None
    for bit, square in enumerate(squares):
        if chunk >> bit & 1:
            whole = square if whole is None else whole @ square
    assert whole is not None
    return Powers(
        squares, whole, reads.unflatten(1, (chunk, outputs)), feeds, taps.squeeze(-1).unflatten(1, (chunk, outputs))
    )


def toeplitz(taps: Tensor) -> Tensor:
    """taps [D,Q,R] -> tile [D,Q,Q,R], entry (j, i) = tap i - j: what the input j adds to the output i."""
    step = torch.arange(taps.shape[1], device=taps.device)
    distance = step - step.unsqueeze(1)
    tile = taps[:, distance.clamp(min=0)]
    return torch.where((distance >= 0).unsqueeze(-1), tile, 0.0)


def carry(fed: Tensor, kept: Tensor, move: Tensor) -> Tensor:
    """e_c = kept_c M e_{c-1} + fed_c over the chunks c, by pairs. fed [D,R,C,N], kept bool [C], move: M [D,N,N]."""
    chunks = fed.shape[2]
    if chunks == 1:
        return fed
    if chunks % 2:
        fed, kept = F.pad(fed, (0, 0, 0, 1)), F.pad(kept, (0, 1))
    even, odd = fed[:, :, 0::2], fed[:, :, 1::2]
    keeps_even, keeps_odd = kept[0::2], kept[1::2]
    merged = odd + torch.where(keeps_odd.unsqueeze(-1), moved(even, move), 0.0)
    odd = carry(merged, keeps_even & keeps_odd, move @ move)
    before = F.pad(odd[:, :, :-1], (0, 0, 1, 0))
    even = even + torch.where(keeps_even.unsqueeze(-1), moved(before, move), 0.0)
    return torch.stack([even, odd], 3).flatten(2, 3)[:, :, :chunks]


def moved(state: Tensor, move: Tensor) -> Tensor:
    """M h for every state h of [D,R,C,N] (or [D,S,N]), M [D,N,N]."""
    flat = state.flatten(1, -2) @ move.to(state.dtype).mT
    return flat.reshape(state.shape)


def state_space_chunked(
    x: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `state_space_scan`, without D; x and the state are in the accumulation dtype."""
    batch, tokens, channels = x.shape
    outputs, width = C.shape[1:]
    if tokens == 0:
        sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        empty = x.new_zeros(sequences, channels, width) if initial_state is None else initial_state.clone()
        return x.new_zeros(batch, 0, outputs, channels), empty
    layout = rows_in_chunks(x, min(CHUNK, tokens)) if cu_seqlens is None else packed_in_chunks(x, cu_seqlens)
    powers = powers_of(A, B, C, layout.chunk)
    x_DRCQ = layout.split(x).movedim(3, 0)
    rows = x_DRCQ.flatten(1, 2)  # [D,RC,Q]
    added = (rows @ powers.feeds.to(x.dtype).mT).unflatten(1, x_DRCQ.shape[1:3])  # [D,R,C,N]
    entering = enter(added, initial_state, powers.whole, layout)
    y = rows @ toeplitz(powers.taps.to(x.dtype)).flatten(2)
    y = y + entering.flatten(1, 2) @ powers.reads.to(x.dtype).flatten(1, 2).mT  # [D,RC,QR]
    y = y.reshape(channels, *x_DRCQ.shape[1:], outputs).movedim(0, -1)  # [R,C,Q,outputs,D]
    return layout.join(y), leave(x, entering, initial_state, powers, layout, cu_seqlens)


def enter(added: Tensor, initial_state: Tensor | None, move: Tensor, layout: Layout) -> Tensor:
    """State that enters each chunk, [D,R,C,N]. added: what each chunk adds. initial_state: [S,D,N] or None."""
    before = F.pad(added[:, :, :-1], (0, 0, 1, 0))
    if initial_state is None:
        given = torch.zeros_like(before)
    elif layout.sequence is None:
        given = initial_state.transpose(0, 1).unsqueeze(2)
    else:
        given = initial_state[layout.sequence].transpose(0, 1).unsqueeze(1)
    fed = torch.where(layout.starts.unsqueeze(-1), given, before)
    return carry(fed, ~layout.starts, move)


def leave(
    x: Tensor,
    entering: Tensor,
    initial_state: Tensor | None,
    powers: Powers,
    layout: Layout,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """State after the last token of each sequence, [S,D,N]; the last chunk may hold fewer than Q tokens."""
    chunk = layout.chunk
    if cu_seqlens is None:
        left = layout.tokens - (layout.chunks - 1) * chunk
        tokens = F.pad(x[:, layout.tokens - left :], (0, 0, chunk - left, 0))  # [B,Q,D]
        state = entering[:, :, -1]  # [D,B,N]
        for bit, square in enumerate(powers.squares):
            if left >> bit & 1:
                state = moved(state, square)
    else:
        assert layout.final is not None
        assert layout.empty is not None
        ends = cu_seqlens[1:].long()
        count = (ends - cu_seqlens[:-1].long() - 1) % chunk + 1  # tokens in the last chunk; Q for an empty sequence
        slot = torch.arange(chunk, device=x.device) - chunk
        at = (ends.unsqueeze(1) + slot).clamp(min=0)
        real = slot >= -count.unsqueeze(1)
        tokens = torch.where(real.unsqueeze(-1), x[0, at.clamp(max=x.shape[1] - 1)], 0.0)  # [S,Q,D]
        state = entering[:, 0].index_select(1, layout.final)  # [D,S,N]
        for bit, square in enumerate(powers.squares):
            state = torch.where((count >> bit & 1).bool().unsqueeze(-1), moved(state, square), state)
    added = tokens.movedim(2, 0) @ powers.feeds.to(x.dtype).mT  # [D,S,N]
    final = (state + added).transpose(0, 1)
    if layout.empty is not None:
        kept = torch.zeros_like(final) if initial_state is None else initial_state
        final = torch.where(layout.empty[:, None, None], kept, final)
    return final.contiguous()

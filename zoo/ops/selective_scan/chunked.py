"""The selective scan in plain PyTorch, a chunk of tokens at a time: whole-chunk products, one fused step per token.

Memory is that of a chunk, whatever the length. Decays are exponentials of their own, never quotients of products, so
nothing overflows. Letters beside the legend: K tokens of a chunk, J channels of a group (E = G J); tiles are
[K,B,G,N,J], channels last, so that a step over tokens and a sum over states both run along contiguous memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype

SHORTEST, LONGEST = 16, 64  # tokens of a chunk
CHUNK_ELEMENTS = 2**18  # elements of a chunk's states that fit in a cache


def chunk_length(rows: int, channels: int, state: int) -> int:
    """Tokens of a chunk, K, for rows * channels * state states a token."""
    return max(SHORTEST, min(LONGEST, CHUNK_ELEMENTS // max(1, rows * channels * state)))


def states_shape(x: Tensor, B: Tensor) -> tuple[int, ...]:
    """Shape of the states entering each chunk, [chunks,B,G,N,J]."""
    batch, tokens, channels = x.shape
    groups, width = B.shape[2:]
    length = chunk_length(batch, channels, width)
    return (tokens + length - 1) // length, batch, groups, width, channels // groups


@dataclass(frozen=True)
class Bounds:
    """Tokens that begin and end a sequence -> the rows of the state that belong to it."""

    starts: dict[int, slice]
    ends: dict[int, slice]
    sequences: int


def bounds_of(x: Tensor, cu_seqlens: Tensor | None) -> Bounds:
    """Bounds of the sequences of x [B,T,E]; empty ones have none."""
    batch, tokens, _ = x.shape
    if cu_seqlens is None:
        rows = slice(0, batch)
        return Bounds({0: rows}, {tokens - 1: rows}, batch)
    runs = list(itertools.pairwise(cu_seqlens.tolist()))
    kept = [(a, z, slice(s, s + 1)) for s, (a, z) in enumerate(runs) if z > a]
    return Bounds({a: rows for a, _, rows in kept}, {z - 1: rows for _, z, rows in kept}, len(runs))


@dataclass(frozen=True)
class Chunk:
    """What a chunk's tokens bring, in the accumulation dtype.

    raw: time steps before softplus, step: after it, x: [K,B,G,1,J]. B, C: [K,B,G,1,N]. decay: [K,B,G,N,J].
    """

    raw: Tensor
    step: Tensor
    x: Tensor
    B: Tensor
    C: Tensor
    decay: Tensor

    def added(self) -> Tensor:
        """dt x B [K,B,G,N,J]; with the decayed past added in place it becomes the states."""
        added: Tensor = (self.step * self.x) * self.B.mT
        return added


def tile(part: Tensor, span: slice, groups: int) -> Tensor:
    """Tokens `span` of a part [B,T,E] as [K,B,G,1,J] in the accumulation dtype."""
    inner = accumulation_dtype(part.dtype)
    tokens = part[:, span].transpose(0, 1).to(inner)
    tiles: Tensor = tokens.unflatten(2, (groups, 1, -1))
    return tiles


def read_chunk(
    x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None, dt_softplus: bool, span: slice
) -> Chunk:
    """The tokens `span`. rate: A as [G,N,J]. dt_bias: [G,1,J], both in the accumulation dtype."""
    groups = B.shape[2]
    raw = tile(dt, span, groups).to(rate.dtype)
    if dt_bias is not None:
        raw = raw + dt_bias
    step = torch.logaddexp(raw, torch.zeros_like(raw)) if dt_softplus else raw
    keys, queries = (part[:, span].transpose(0, 1).unsqueeze(3).to(rate.dtype) for part in (B, C))
    return Chunk(raw, step, tile(x, span, groups), keys, queries, (step * rate).exp_())


def advance(
    states: Sequence[Tensor], decay: Sequence[Tensor], past: Tensor | None, initial: Tensor | None, bounds: Bounds,
    first: int,
) -> None:  # fmt: skip
    """Add the decayed past to what each token adds, in place: states and decay are K tiles [B,G,N,J].

    past: state before the chunk. initial: initial states [S,G,N,J] or None. first: number of the first token.
    """
    for k, state in enumerate(states):
        rows = bounds.starts.get(first + k)
        if rows is not None:
            past = None if initial is None else initial[rows]
        if past is not None:
            state.addcmul_(decay[k], past)
        past = state


def by_group(part: Tensor, groups: int, inner: torch.dtype) -> Tensor:
    """[X,E,N] -> [X,G,N,J] in `inner`, contiguous."""
    tiles: Tensor = part.to(inner).unflatten(1, (groups, -1))
    return tiles.transpose(2, 3).contiguous()


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B,T,E], final state [S,E,N] and the states entering each chunk; arguments as in `selective_scan`."""
    inner, groups, tokens = accumulation_dtype(x.dtype), B.shape[2], x.shape[1]
    bounds = bounds_of(x, cu_seqlens)
    rate = by_group(A.unsqueeze(0), groups, inner)[0]
    skip, bias = (None if part is None else part.to(inner).unflatten(0, (groups, 1, -1)) for part in (D, dt_bias))
    initial = None if initial_state is None else by_group(initial_state, groups, inner)
    final = rate.new_zeros(bounds.sequences, *rate.shape) if initial is None else initial.clone()
    kept = torch.empty(states_shape(x, B), dtype=inner, device=x.device)
    kept[:1] = 0
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    length = chunk_length(x.shape[0], x.shape[2], B.shape[3])
    past: Tensor | None = None
    for number, first in enumerate(range(0, tokens, length)):
        span = slice(first, min(first + length, tokens))
        chunk = read_chunk(x, dt, rate, B, C, bias, dt_softplus, span)
        if past is not None:
            kept[number] = past
        states = chunk.added()
        advance(states.unbind(0), chunk.decay.unbind(0), past, initial, bounds, first)
        past = states[-1]
        for k, state in enumerate(states.unbind(0)):
            rows = bounds.ends.get(first + k)
            if rows is not None:
                final[rows] = state
        out = chunk.C @ states  # [K,B,G,1,J]
        if skip is not None:
            out = out + skip * chunk.x
        if z is not None:
            out = out * F.silu(tile(z, span, groups))
        y[:, span] = out.flatten(2).transpose(0, 1)
    return y, final.transpose(2, 3).reshape(bounds.sequences, *A.shape), kept

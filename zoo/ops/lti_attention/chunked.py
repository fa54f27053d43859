"""LTI attention in plain PyTorch: a Toeplitz mask inside chunks, states of complex modes (as real pairs) between them.

Inside a chunk the mask is one Toeplitz tile per head, shared by the whole batch. Between chunks every mode is carried
by the same number in every chunk, so the scan over chunks doubles its reach in each step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.lti_attention.cost import NARROW, plain_chunk
from zoo.ops.lti_attention.factors import chunk_factors, power_of, powers, times, toeplitz
from zoo.ops.lti_attention.one_token import one_token
from zoo.ops.lti_attention.scalar import gated_scan
from zoo.ops.semiseparable.chunked import Layout, packed_in_chunks, rows_in_chunks, split_axis


def lti_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    c: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `lti_attention`; sums in the accumulation dtype, y rounded once."""
    if v.numel() == 0:
        return empty_result(v, log_a, initial_state, cu_seqlens)
    if v.shape[1] == 1 and cu_seqlens is None:
        y, final = one_token(q, k, v, log_a, c, D, initial_state)
        return y.to(v.dtype), final
    inner = accumulation_dtype(v.dtype)
    if v.shape[3] == 1:
        wide_q, wide_k, wide_v = (part.to(inner) for part in (q, k, v))
        y, final = gated_scan(wide_q, wide_k, wide_v, log_a, c, D, initial_state, cu_seqlens, "chunked")
        return y.to(v.dtype), final
    layout = layout_of(v, log_a.shape[1], cu_seqlens)
    factors = chunk_factors(log_a, c, D, layout.chunk, inner)
    # letters: R rows, C chunks, H heads, K tokens of a chunk, Q = P^2 products k_a v_b
    q_RCHKP, k_RCHKP, v_RCHKP = (layout.split(part.to(inner)).movedim(3, 2) for part in (q, k, v))
    pairs_RCHKQ = pairs_of(k_RCHKP, v_RCHKP)
    tile = toeplitz(factors.taps)
    if v.shape[3] <= NARROW:
        into = [tile, factors.write.flatten(2).mT]
        seen, added = (torch.cat(into, 1) @ pairs_RCHKQ).split([part.shape[1] for part in into], -2)
        y_RCHKP = read_out(q_RCHKP, seen)
    else:
        y_RCHKP = ((q_RCHKP @ k_RCHKP.mT) * tile) @ v_RCHKP
        added = factors.write.flatten(2).mT @ pairs_RCHKQ
    added = as_states(added, v.shape[3])
    entering = entering_states(added, log_a, initial_state, layout)
    if initial_state is not None or layout.chunks > 1:
        y_RCHKP = y_RCHKP + read_states(q_RCHKP, entering, factors.read)
    final = final_states(pairs_RCHKQ, added, entering, log_a, layout, cu_seqlens)
    return layout.join(y_RCHKP.movedim(2, 3)).to(v.dtype), keep_empty(final, initial_state, layout)


def layout_of(v: Tensor, modes: int, cu_seqlens: Tensor | None) -> Layout:
    """How the tokens of v [B,T,H,P], T >= 1, lie in chunks: in a packed row not longer than a usual sequence."""
    tokens, width = v.shape[1], v.shape[3]
    if cu_seqlens is None:
        return rows_in_chunks(v, min(plain_chunk(modes, width, tokens), tokens))
    return packed_in_chunks(v, cu_seqlens, plain_chunk(modes, width, tokens // max(1, cu_seqlens.numel() - 1)))


def empty_result(
    v: Tensor, log_a: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the final state where there is no token."""
    if initial_state is not None:
        return v.clone(), initial_state.clone()
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    sizes = (sequences, v.shape[2], log_a.shape[1], 2, v.shape[3], v.shape[3])
    return v.clone(), v.new_zeros(sizes, dtype=accumulation_dtype(v.dtype))


def pairs_of(k: Tensor, v: Tensor) -> Tensor:
    """Products k_a v_b of every token: [...,P], [...,P] -> [...,P^2]."""
    return (k.unsqueeze(-1) * v.unsqueeze(-2)).flatten(-2)


def read_out(q: Tensor, seen: Tensor) -> Tensor:
    """q^T S of every token: [...,P], [...,P^2] -> [...,P]."""
    return (q.unsqueeze(-1) * split_axis(seen, -1, q.shape[-1], q.shape[-1])).sum(-2)


def as_states(flat: Tensor, width: int) -> Tensor:
    """[...,2M,P^2] -> [...,M,2,P,P]."""
    return split_axis(split_axis(flat, -2, -1, 2), -1, width, width)


def read_states(q_RCHKP: Tensor, entering: Tensor, read: Tensor) -> Tensor:
    """What the tokens of each chunk read from the state before it, [R,C,H,K,P]."""
    return read_out(q_RCHKP, read.flatten(2) @ entering.flatten(3, 4).flatten(-2))


def carried(state: Tensor, log_a: Tensor, tokens: int) -> Tensor:
    """State [...,H,M,2,P,P] after `tokens` steps without input."""
    factor = power_of(log_a, tokens).to(state.dtype)[..., None, None, :]  # [H,M,1,1,2]
    return times(state.movedim(-3, -1), factor).movedim(-1, -3)


def entering_states(added: Tensor, log_a: Tensor, initial_state: Tensor | None, layout: Layout) -> Tensor:
    """State before each chunk, [R,C,H,M,2,P,P]: that of its sequence's start, and what the chunks since then added."""
    chunks, inner = layout.chunks, added.dtype
    index = torch.arange(chunks, device=added.device)
    age = index - torch.where(layout.starts, index, 0).cummax(0).values  # chunks since the sequence began
    before = F.pad(added[:, :-1], (0, 0) * 5 + (1, 0))
    if initial_state is None:
        given = torch.zeros_like(before)
    elif layout.sequence is None:
        given = initial_state.to(inner).unsqueeze(1)
    else:
        given = initial_state.to(inner)[layout.sequence].unsqueeze(0)
    total = torch.where(_over(layout.starts), given, before)
    reach = 1
    while reach < chunks:
        earlier = F.pad(total[:, :-reach], (0, 0) * 5 + (reach, 0))
        earlier = carried(earlier, log_a, reach * layout.chunk)
        total = total + torch.where(_over(age >= reach), earlier, 0.0)
        reach *= 2
    return total


def final_states(
    pairs_RCHKQ: Tensor,
    added: Tensor,
    entering: Tensor,
    log_a: Tensor,
    layout: Layout,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """State after the last token of each sequence but for empty ones, [S,H,M,2,P,P]; its last chunk may not be full."""
    chunk, inner = layout.chunk, entering.dtype
    if cu_seqlens is None and layout.tokens == layout.chunks * chunk:
        return carried(entering[:, -1], log_a, chunk) + added[:, -1]
    pairs_SHKQ, before = layout.last(pairs_RCHKQ), layout.last(entering)
    width = entering.shape[-1]
    if cu_seqlens is None:
        filled = layout.tokens - (layout.chunks - 1) * chunk
        write = powers(log_a, 0, filled).flip(1).to(inner)  # [H,filled,M,2]
        return carried(before, log_a, filled) + as_states(write.flatten(2).mT @ pairs_SHKQ[:, :, :filled], width)
    lengths = cu_seqlens.long().diff()
    left = lengths - (lengths - 1).clamp(min=0) // chunk * chunk  # tokens of the last chunk, [S]
    lag = left.unsqueeze(1) - 1 - torch.arange(chunk, device=left.device)  # [S,K]
    raised = powers(log_a, 0, chunk).movedim(1, 0)  # [K,H,M,2]
    write = torch.where((lag >= 0)[..., None, None, None], raised[lag.clamp(min=0)], 0.0).to(inner)  # [S,K,H,M,2]
    factor = power_of(log_a, left[:, None, None]).to(inner)  # [S,H,M,2]
    kept = times(before.movedim(-3, -1), factor[..., None, None, :]).movedim(-1, -3)
    return kept + as_states(write.movedim(1, 2).flatten(-2).mT @ pairs_SHKQ, width)


def keep_empty(final: Tensor, initial_state: Tensor | None, layout: Layout) -> Tensor:
    """`final` [S,H,M,2,P,P] with the initial state where a packed sequence has no token."""
    if layout.empty is None:
        return final
    nothing = torch.zeros_like(final) if initial_state is None else initial_state.to(final.dtype)
    return torch.where(_over(layout.empty), nothing, final)


def _over(flags: Tensor) -> Tensor:
    """bool [C] or [S] against states [...,C or S,H,M,2,P,P]."""
    return flags[:, None, None, None, None, None]

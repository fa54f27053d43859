"""LTI attention by its definition: the whole matrix M_ij = (K_{i-j} + D d_ij) <q_i, k_j>, one sequence at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def lti_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    c: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `lti_attention`. Any dtype, differentiable any number of times; [T,T] matrices of every head."""
    inner = accumulation_dtype(v.dtype)
    batch, _, heads, width = v.shape
    wide_q, wide_k, wide_v = q.to(inner), k.to(inner), v.to(inner)
    if cu_seqlens is None:
        runs = [(slice(None), slice(None), slice(None))]
    else:
        ends = cu_seqlens.tolist()
        runs = [(slice(0, 1), slice(s, s + 1), slice(a, b)) for s, (a, b) in enumerate(itertools.pairwise(ends))]
    outputs, finals = [wide_v[:, :0]], []
    for row, sequence, times in runs:
        if initial_state is not None:
            state = initial_state[sequence].to(inner)
        else:
            state = wide_v.new_zeros(batch, heads, log_a.shape[1], 2, width, width)
        y, final = _one_run(wide_q[row, times], wide_k[row, times], wide_v[row, times], log_a, c, D, state)
        outputs.append(y)
        finals.append(final)
    return torch.cat(outputs, 1).to(v.dtype), torch.cat(finals)


def _one_run(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, c: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """y [B,T,H,P] and the last state [B,H,M,2,P,P] of whole sequences, all in the accumulation dtype."""
    tokens, inner = q.shape[1], q.dtype
    lags = torch.arange(tokens + 1, device=q.device, dtype=torch.float64)[:, None]
    rate, turn = log_a.double().unbind(-1)  # [H,M]
    c_re, c_im = c.double().unbind(-1)
    size = (lags * rate.unsqueeze(1)).exp()  # [H,T+1,M]
    re, im = size * (lags * turn.unsqueeze(1)).cos(), size * (lags * turn.unsqueeze(1)).sin()
    seen_re = 2.0 * (c_re.unsqueeze(1) * re - c_im.unsqueeze(1) * im)
    seen_im = -2.0 * (c_re.unsqueeze(1) * im + c_im.unsqueeze(1) * re)

    kernel = seen_re.sum(-1)  # [H,T+1]
    steps = torch.arange(tokens, device=q.device)
    lag = steps.unsqueeze(1) - steps
    mask = kernel[:, lag.clamp(min=0)]  # [H,T,T]
    if D is not None:
        mask = mask + D.double()[:, None, None] * (lag == 0)
    mask = (mask * (lag >= 0)).to(inner)
    y = torch.einsum("bhij,bjhr->bihr", torch.einsum("bihp,bjhp->bhij", q, k) * mask, v)
    before = torch.stack([seen_re[:, 1:], seen_im[:, 1:]], -1).to(inner)  # [H,T,M,2]
    y = y + torch.einsum("htmz,bthp,bhmzpr->bthr", before, q, state)

    to_end = torch.stack([re[:, :tokens].flip(1), im[:, :tokens].flip(1)], -1).to(inner)
    added = torch.einsum("htmz,bthp,bthr->bhmzpr", to_end, k, v)
    over_re, over_im = (part[:, tokens, :, None, None].to(inner) for part in (re, im))  # [H,M,1,1]
    state_re, state_im = state.unbind(3)
    kept = torch.stack([over_re * state_re - over_im * state_im, over_re * state_im + over_im * state_re], 3)
    return y, kept + added

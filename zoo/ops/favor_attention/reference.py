"""FAVOR+ attention by its definition: one token at a time with a running maximum, or one sum over all of them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def favor_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    features: str,
    causal: bool,
    eps: float,
    feature_eps: float,
    compat: str | None,
    padding_mask: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `favor_attention`. Any dtype, differentiable any number of times."""
    inner = accumulation_dtype(v.dtype)
    heads = q.shape[2]
    written = torch.cat([v.to(inner), torch.ones_like(v[..., :1], dtype=inner)], -1)
    k, written = (part.repeat_interleave(heads // part.shape[2], 2) for part in (k, written))
    (dash_q, half_q), (dash_k, half_k) = (_project(part.to(inner), projection.to(inner), features) for part in (q, k))
    shape = (dash_k.shape[-1], v.shape[-1] + 1)
    y = v.new_zeros(*q.shape[:3], v.shape[-1], dtype=inner)
    finals = []
    for s, (row, queries, keys) in enumerate(_runs(q, k, padding_mask, cu_seqlens)):
        state = y.new_zeros(heads, *shape)
        top = state[..., 0] + torch.finfo(inner).min
        if initial_state is not None:
            state, top = initial_state[s, ..., :-1].to(inner), initial_state[s, ..., -1].to(inner)
        read, values = dash_q[row, queries], written[row, keys]
        if features == "relu":
            phi_q, phi_k = read.relu() + feature_eps, dash_k[row, keys].relu() + feature_eps
            out, state, top = _sums(phi_q, phi_k, values, causal, eps, state, top)
        elif compat == "jax":
            dash, half = dash_k[row, keys], half_k[row, keys]
            phi_q = (read - half_q[row, queries] - read.detach().amax(-1, keepdim=True)).exp() + feature_eps
            highest = dash.detach().amax((0, 2)) if dash.shape[0] else dash.new_zeros(heads)
            phi_k = (dash - half - highest[:, None]).exp() + feature_eps
            out, state, top = _sums(phi_q, phi_k, values, causal, eps * shape[0], state, top)
            top = torch.where(top == 0, highest[:, None], top)
        else:
            log_q, log_k = read - half_q[row, queries], dash_k[row, keys] - half_k[row, keys]
            out, state, top = _scaled_sums(log_q, log_k, values, causal, eps * shape[0], state, top)
        y[row, queries] = out
        finals.append(torch.cat([state, top.unsqueeze(-1)], -1))
    return y.to(v.dtype), torch.stack(finals)


def _project(x: Tensor, projection: Tensor, features: str) -> tuple[Tensor, Tensor]:
    """<w, x'> [B,T,H,M] and |x'|^2 / 2 [B,T,H,1], with x' = N^-1/4 x."""
    scaled = x / x.shape[-1] ** 0.25
    if features == "hyperbolic":
        projection = torch.cat([projection, -projection])
    return torch.einsum("bthn,mn->bthm", scaled, projection), scaled.square().sum(-1, keepdim=True) / 2


def _runs(
    q: Tensor, k: Tensor, padding_mask: Tensor | None, cu_seqlens: Tensor | None
) -> list[tuple[int, slice, slice]]:
    """Row, real queries and real keys of every sequence."""
    if cu_seqlens is not None:
        return [(0, slice(a, b), slice(a, b)) for a, b in itertools.pairwise(cu_seqlens.tolist())]
    whole = slice(None)
    if padding_mask is None:
        return [(row, whole, whole) for row in range(q.shape[0])]
    runs = []
    for row in range(q.shape[0]):
        first = int(padding_mask[row].int().argmax())
        real = slice(first, first + int(padding_mask[row].sum()))
        runs.append((row, real if q.shape[1] == k.shape[1] else whole, real))
    return runs


def _sums(
    phi_q: Tensor, phi_k: Tensor, values: Tensor, causal: bool, eps: float, state: Tensor, top: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [T,H,M] as they are; the scale of a state with keys is 1, whose logarithm is 0."""
    outputs = [values[:0, :, :-1]]
    if not causal:
        state = state + torch.einsum("khm,khp->hmp", phi_k, values)
        outputs.append(_divide(torch.einsum("thm,hmp->thp", phi_q, state), eps))
    for t in range(phi_k.shape[0] if causal else 0):
        state = state + phi_k[t].unsqueeze(-1) * values[t].unsqueeze(-2)
        outputs.append(_divide((phi_q[t].unsqueeze(-1) * state).sum(-2), eps).unsqueeze(0))
    return torch.cat(outputs), state, torch.zeros_like(top) if phi_k.shape[0] else top


def _scaled_sums(
    log_q: Tensor, log_k: Tensor, values: Tensor, causal: bool, eps: float, state: Tensor, top: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of features [T,H,M]; the state is scaled by exp(-top), every row by its largest summand."""
    outputs = [values[:0, :, :-1]]
    if not causal and log_k.shape[0]:
        top = log_k.detach().amax(0)
        state = state + torch.einsum("khm,khp->hmp", (log_k - top).exp(), values)
    if not causal:
        logits = log_q + top
        highest = logits.detach().amax(-1, keepdim=True)
        read = torch.einsum("thm,hmp->thp", (logits - highest).exp(), state)
        outputs.append(_divide(read, eps * (-highest).exp() if eps else 0.0))
    for t in range(log_k.shape[0] if causal else 0):
        grown = torch.maximum(top, log_k[t].detach())
        state = state * (top - grown).exp().unsqueeze(-1)
        state = state + (log_k[t] - grown).exp().unsqueeze(-1) * values[t].unsqueeze(-2)
        top = grown
        logits = log_q[t] + top
        highest = logits.detach().amax(-1, keepdim=True)
        read = ((logits - highest).exp().unsqueeze(-1) * state).sum(-2)
        outputs.append(_divide(read, eps * (-highest).exp() if eps else 0.0).unsqueeze(0))
    return torch.cat(outputs), state, top


def _divide(sums: Tensor, eps: Tensor | float) -> Tensor:
    """[..., P+1] -> [..., P]; 0 where there are no weights."""
    total = sums[..., -1:] + eps
    return sums[..., :-1] / torch.where(total > 0, total, 1.0)

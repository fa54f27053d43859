"""Gradients of the selective scan in plain PyTorch: chunks from last to first, states computed again in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.selective_scan.chunked import Bounds, Chunk, advance, bounds_of, by_group, chunk_length, read_chunk, tile


@dataclass
class Gradients:
    """Gradients while they gather, in the accumulation dtype. Tokenwise ones are in the dtype of their tensor.

    x, dt, z: [B,T,E]. B, C: [B,T,G,N]. rate: [G,N,J]. skip, bias: [G,1,J]. initial: [S,G,N,J].
    """

    x: Tensor
    dt: Tensor
    z: Tensor | None
    B: Tensor
    C: Tensor
    rate: Tensor
    skip: Tensor
    bias: Tensor
    initial: Tensor


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    states: Tensor,
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
) -> list[Tensor | None]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state; None for those that are absent.

    states: those entering each chunk, as the forward keeps them.
    """
    inner, groups, tokens = accumulation_dtype(x.dtype), B.shape[2], x.shape[1]
    bounds = bounds_of(x, cu_seqlens)
    rate = by_group(A.unsqueeze(0), groups, inner)[0]
    skip, bias = (None if part is None else part.to(inner).unflatten(0, (groups, 1, -1)) for part in (D, dt_bias))
    initial = None if initial_state is None else by_group(initial_state, groups, inner)
    reached = None if dfinal is None else by_group(dfinal, groups, inner)
    got = _empty(x, dt, z, B, C, rate, bounds, reached)
    length = chunk_length(x.shape[0], x.shape[2], B.shape[3])
    later: Tensor | None = None  # gradient of the state that leaves the chunk, through the tokens after it
    for number in reversed(range(states.shape[0])):
        first = number * length
        span = slice(first, min(first + length, tokens))
        chunk = read_chunk(x, dt, rate, B, C, bias, dt_softplus, span)
        entering = states[number]
        held = chunk.added()
        advance(held.unbind(0), chunk.decay.unbind(0), entering, initial, bounds, first)
        cotangent = tile(dy, span, groups).to(inner)
        if z is not None:
            assert got.z is not None
            gate = tile(z, span, groups)
            out = chunk.C @ held
            if skip is not None:
                out = out + skip * chunk.x
            sigmoid = torch.sigmoid(gate)
            got.z[:, span] = _rows(cotangent * out * sigmoid * (1 + gate * (1 - sigmoid)))
            cotangent = cotangent * gate * sigmoid
        grads = cotangent * chunk.C.mT  # [K,B,G,N,J], becomes the gradient of the states
        later = retreat(grads.unbind(0), chunk.decay.unbind(0), later, reached, got.initial, bounds, first)
        decayed = _decayed(held, chunk.decay, entering, initial, bounds, first)
        _gather(got, chunk, span, grads, held, decayed, cotangent, rate, skip, dt_softplus)
    parts = [got.x, got.dt, got.rate.mT.reshape(A.shape).to(A.dtype), got.B, got.C, None, got.z, None, None]
    if D is not None:
        parts[5] = got.skip.reshape(D.shape).to(D.dtype)
    if dt_bias is not None:
        parts[7] = got.bias.reshape(dt_bias.shape).to(dt_bias.dtype)
    if initial_state is not None:
        parts[8] = got.initial.mT.reshape(initial_state.shape).to(initial_state.dtype)
    return parts


def _empty(
    x: Tensor, dt: Tensor, z: Tensor | None, B: Tensor, C: Tensor, rate: Tensor, bounds: Bounds, reached: Tensor | None
) -> Gradients:
    def like(part: Tensor) -> Tensor:
        return torch.empty(part.shape, dtype=part.dtype, device=part.device)

    through = rate.new_zeros(bounds.sequences, *rate.shape) if reached is None else reached.clone()  # empty sequences
    sums = rate.new_zeros(rate.shape[0], 1, rate.shape[2])
    gate = None if z is None else like(z)
    return Gradients(
        like(x), like(dt), gate, like(B), like(C), torch.zeros_like(rate), sums, torch.zeros_like(sums), through
    )


def retreat(
    grads: Sequence[Tensor],
    decay: Sequence[Tensor],
    later: Tensor | None,
    reached: Tensor | None,
    initial: Tensor,
    bounds: Bounds,
    first: int,
) -> Tensor:
    """Add to each token's own share of the state's gradient what comes from later tokens, in place.

    grads and decay: K tiles [B,G,N,J]. later: gradient that comes from the next chunk. reached: gradients of the final
    states [S,G,N,J] or None. initial: filled with those of the initial states. Returns what goes to the chunk before.
    """
    last = len(grads) - 1
    for k in reversed(range(len(grads))):
        rows = bounds.ends.get(first + k)
        if rows is not None:
            if reached is not None:
                grads[k].add_(reached[rows])
        elif k < last:
            grads[k].addcmul_(decay[k + 1], grads[k + 1])
        elif later is not None:
            grads[k].add_(later)
        rows = bounds.starts.get(first + k)
        if rows is not None:
            initial[rows] = decay[k] * grads[k]
    return decay[0] * grads[0]


def _decayed(
    held: Tensor, decay: Tensor, entering: Tensor, initial: Tensor | None, bounds: Bounds, first: int
) -> Tensor:
    """Decay times the state before each token, [K,B,G,N,J]."""
    before = torch.cat([entering.unsqueeze(0), held[:-1]])
    for k in range(held.shape[0]):
        rows = bounds.starts.get(first + k)
        if rows is not None:
            before[k] = 0 if initial is None else initial[rows]
    return before.mul_(decay)


def _gather(
    got: Gradients,
    chunk: Chunk,
    span: slice,
    grads: Tensor,
    held: Tensor,
    decayed: Tensor,
    cotangent: Tensor,
    rate: Tensor,
    skip: Tensor | None,
    dt_softplus: bool,
) -> None:
    """Fill and add up the gradients of one chunk.

    grads, held, decayed: gradient of the states, the states, and decay times the states before, [K,B,G,N,J].
    cotangent: gradient of the output before the gate, [K,B,G,1,J].
    """
    got.B[:, span] = (grads @ (chunk.step * chunk.x).mT).squeeze(4).transpose(0, 1)
    got.C[:, span] = (held @ cotangent.mT).squeeze(4).transpose(0, 1)
    entered = chunk.B @ grads  # gradient of dt x, [K,B,G,1,J]
    dx = chunk.step * entered
    if skip is not None:
        dx = dx + skip * cotangent
        got.skip += (cotangent * chunk.x).sum((0, 1))
    got.x[:, span] = _rows(dx)
    weighed = decayed.mul_(grads)
    got.rate += (weighed * chunk.step).sum((0, 1))
    dstep = (weighed * rate).sum(3, keepdim=True) + chunk.x * entered
    if dt_softplus:
        dstep = dstep * torch.sigmoid(chunk.raw)
    got.bias += dstep.sum((0, 1))
    got.dt[:, span] = _rows(dstep)


def _rows(part: Tensor) -> Tensor:
    """[K,B,G,1,J] -> [B,K,E]."""
    return part.flatten(2).transpose(0, 1)

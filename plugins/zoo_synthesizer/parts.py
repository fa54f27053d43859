"""The parts of the logits as modules: what each has learned, and the operands it gives to attention.

Positions come as a slice, when all rows are alike and positions count up, or as int64 [b,T].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from zoo_synthesizer.config import SynthesizerConfig

Positions = slice | Tensor


class Inner(NamedTuple):
    """Logits <q_i, k_j>. q: [B or 1,Tq,H,N]. k: [B or 1,Tk,H or 1,N]."""

    q: Tensor
    k: Tensor


class Outer(NamedTuple):
    """Logits left_i[j // b] right_i[j % b]. left: [B,Tq,H,a]. right: [B,Tq,H,b]."""

    left: Tensor
    right: Tensor


class Table(NamedTuple):
    """Logits by position, [H,L,L]."""

    table: Tensor


Operands = Inner | Outer | Table


def at_positions(learned: Tensor, positions: Positions) -> Tensor:
    """What is learned per position, [H,L,N], at some positions: [1 or b,T,H,N]; the last row for those behind it."""
    if isinstance(positions, slice):
        return learned[:, positions].transpose(0, 1).unsqueeze(0)
    rows = embedding(positions.clamp(max=learned.shape[1] - 1), learned.transpose(0, 1).flatten(1))
    return rows.reshape(*positions.shape, learned.shape[0], learned.shape[2])


class DenseMap(nn.Module):
    """w2 relu(w1 x + b1) + b2 for every head: D -> F -> `size`.

    w1: [H,F,D], or none if the hidden layer is given. w2: [H or 1,size,F]. b1: [H,F], b2: [H or 1,size].
    """

    def __init__(self, config: SynthesizerConfig, size: int, *, own_w1: bool = True, tied: bool = False) -> None:
        super().__init__()
        heads, hidden, last = config.heads, config.hidden, 1 if tied else config.heads
        self.w1 = glorot(heads, hidden, config.d_model) if own_w1 else None
        self.b1 = nn.Parameter(torch.zeros(heads, hidden)) if own_w1 and config.bias else None
        self.w2 = glorot(last, size, hidden)
        self.b2 = nn.Parameter(torch.zeros(last, size)) if config.bias else None

    def hidden(self, x: Tensor) -> Tensor:
        """relu(w1 x + b1) of x [B,T,D]: [B,T,H,F]."""
        assert self.w1 is not None
        raised = linear(x, self.w1.flatten(0, 1), None if self.b1 is None else self.b1.flatten())
        return raised.reshape(*x.shape[:2], *self.w1.shape[:2]).relu()

    def last(self, hidden: Tensor) -> Tensor:
        """w2 h + b2 of h [B,T,H,F]: [B,T,H,size]."""
        out = torch.einsum("bthf,hsf->bths", hidden, self.w2.to(hidden.dtype))
        return out if self.b2 is None else out + self.b2.to(out.dtype)


class DensePart(DenseMap):
    """R_ij = w2_j relu(w1 x_i + b1) + b2_j: an inner product whose keys are learned."""

    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__(config, config.max_length, own_w1=not config.shares_queries, tied=config.tied_w2)

    def operands(self, x: Tensor, keys: Positions, shared: Tensor | None) -> Inner:
        """shared: queries of `vanilla` [B,T,H,P] where it lends them."""
        q = self.hidden(x) if shared is None else shared.relu()
        k: Tensor = self.w2
        if self.b2 is not None:
            q, k = torch.cat([q, torch.ones_like(q[..., :1])], -1), torch.cat([k, self.b2.unsqueeze(-1)], -1)
        return Inner(q, at_positions(k, keys))


class RandomPart(nn.Module):
    """R_ij = table_ij, whatever the input."""

    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__()
        self.table = glorot(config.heads, config.max_length, config.max_length, trained=not config.fixed)

    def operands(self) -> Table:
        return Table(self.table)


class FactorisedRandomPart(nn.Module):
    """R = r1 r2^T, whatever the input; r1, r2: [H,L,k]."""

    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__()
        self.r1 = glorot(config.heads, config.max_length, config.factor_rank, trained=not config.fixed)
        self.r2 = glorot(config.heads, config.max_length, config.factor_rank, trained=not config.fixed)

    def operands(self, queries: Positions, keys: Positions) -> Inner:
        return Inner(at_positions(self.r1, queries), at_positions(self.r2, keys))


class FactorisedDensePart(nn.Module):
    """R_ij = left(x_i)[j // b] right(x_i)[j % b], two dense maps."""

    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__()
        rows, columns = config.grid
        self.left, self.right = DenseMap(config, rows), DenseMap(config, columns)

    def operands(self, x: Tensor) -> Outer:
        return Outer(self.left.last(self.left.hidden(x)), self.right.last(self.right.hidden(x)))


class VanillaPart(nn.Module):
    """R_ij = P^-1/2 <q_i, k_j> of projected tokens, as in softmax attention."""

    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__()
        self.per_head = (config.heads, config.width)
        self.q_proj = nn.Linear(config.d_model, config.heads * config.width, bias=config.bias)
        self.k_proj = nn.Linear(config.d_model, config.heads * config.width, bias=config.bias)

    def queries(self, x: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,H,P], not scaled."""
        raised: Tensor = self.q_proj(x)
        return raised.reshape(*x.shape[:2], *self.per_head)

    def keys_of(self, x: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,H,P]."""
        raised: Tensor = self.k_proj(x)
        return raised.reshape(*x.shape[:2], *self.per_head)


def glorot(heads: int, rows: int, columns: int, *, trained: bool = True) -> nn.Parameter:
    """[H,rows,columns], uniform within (6 / (rows + columns))^1/2, as a matrix of each head would be."""
    bound = (6.0 / (rows + columns)) ** 0.5
    return nn.Parameter(torch.empty(heads, rows, columns).uniform_(-bound, bound), requires_grad=trained)


BUILT = {
    "dense": DensePart,
    "random": RandomPart,
    "factorised_random": FactorisedRandomPart,
    "factorised_dense": FactorisedDensePart,
    "vanilla": VanillaPart,
}

"""The mixed logits of a layer: every part's operands, weighted, and joined to what one call of an operator takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo_synthesizer.config import SynthesizerConfig
from zoo_synthesizer.parts import (
    BUILT,
    DensePart,
    FactorisedDensePart,
    FactorisedRandomPart,
    Inner,
    Operands,
    Positions,
    RandomPart,
    Table,
    VanillaPart,
)


class Logits(NamedTuple):
    """Operands of R_ij = <q_i, k_j> + table_ij + left_i[j // b] right_i[j % b], None where no part has them.

    q: [B,Tq,H,N]. k: [B,Tk,H,N]. table: [H,L,L] by position. left: [B,Tq,H,a]. right: [B,Tq,H,b].
    """

    q: Tensor | None
    k: Tensor | None
    table: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def whole(self, heads: slice, tokens: int, dtype: torch.dtype) -> Tensor:
        """The matrix itself for a sequence of T = `tokens`, in `dtype`: [B or 1,h,T,T]."""
        terms: list[Tensor] = []
        if self.q is not None and self.k is not None:
            q, k = self.q[:, :, heads].to(dtype), self.k[:, :, heads].to(dtype)
            terms.append(torch.einsum("bihn,bjhn->bhij", q, k))
        if self.table is not None:
            terms.append(self.table[None, heads, :tokens, :tokens].to(dtype))
        if self.left is not None and self.right is not None:
            left, right = self.left[:, :, heads].to(dtype), self.right[:, :, heads].to(dtype)
            terms.append((left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)[..., :tokens].transpose(1, 2))
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


class MixedLogits(nn.ModuleDict):
    """R = sum_n alpha_n R_n over the parts, by name; alpha = softmax(alpha_logits), [n], where there are several."""

    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__({name: BUILT[name](config) for name in config.parts})
        self.config = config
        self.alpha_logits = nn.Parameter(torch.zeros(len(config.parts))) if len(config.parts) > 1 else None

    def vanilla_keys(self, x: Tensor) -> Tensor | None:
        """Keys [B,T,H,P] of tokens x [B,T,D], if a part compares tokens."""
        return None if self._vanilla is None else self._vanilla.keys_of(x)

    def operands(
        self, x: Tensor, queries: Positions, keys: Positions, vanilla_keys: Tensor | None, longest: int
    ) -> Logits:
        """Operands for tokens x [B,T,D] that ask.

        queries, keys: their positions. vanilla_keys: [B,Tk,H,P], of the tokens asked. longest: positions that occur.
        """
        inner: list[Inner] = []
        table: Tensor | None = None
        left: Tensor | None = None
        right: Tensor | None = None
        for part, alpha in self._weighted(x, queries, keys, vanilla_keys):
            if isinstance(part, Inner):
                inner.append(Inner(_times(part.q, alpha), part.k))
            elif isinstance(part, Table):
                table = _times(part.table[:, :longest, :longest], alpha)
            else:
                left, right = _times(part.left, alpha), part.right
        q, k = self._joined(inner, x.shape[0]) if inner else (None, None)
        return Logits(q, k, table, left, right)

    def _weighted(
        self, x: Tensor, queries: Positions, keys: Positions, vanilla_keys: Tensor | None
    ) -> list[tuple[Operands, Tensor | None]]:
        """Operands of every part and its weight, None where it is alone."""
        found: list[Operands] = []
        asked = None if self._vanilla is None else self._vanilla.queries(x)
        for part in self.values():
            if isinstance(part, DensePart):
                found.append(part.operands(x, keys, asked if self.config.shares_queries else None))
            elif isinstance(part, RandomPart):
                found.append(part.operands())
            elif isinstance(part, FactorisedRandomPart):
                found.append(part.operands(queries, keys))
            elif isinstance(part, FactorisedDensePart):
                found.append(part.operands(x))
            else:
                assert asked is not None
                assert vanilla_keys is not None
                found.append(Inner(asked * self.config.width**-0.5, vanilla_keys))
        if self.alpha_logits is None:
            return [(operands, None) for operands in found]
        weights = self.alpha_logits.to(torch.float64).softmax(0)
        return list(zip(found, weights.unbind(), strict=True))

    @property
    def _vanilla(self) -> VanillaPart | None:
        for part in self.values():
            if isinstance(part, VanillaPart):
                return part
        return None

    def _joined(self, inner: list[Inner], batch: int) -> tuple[Tensor, Tensor]:
        """One inner product for the sum of several: their channels side by side, [B,T,H,N]."""
        full = (batch, -1, self.config.heads, -1)
        q, k = [each.q.expand(full) for each in inner], [each.k.expand(full) for each in inner]
        return (q[0], k[0]) if len(inner) == 1 else (torch.cat(q, -1), torch.cat(k, -1))


def _times(tensor: Tensor, alpha: Tensor | None) -> Tensor:
    """The tensor times a weight [], float64; itself without one.

    The gradient of the weight is a sum over the whole tensor, of which little is left beside that of the other weights.
    In float32 only its last axis is summed as such, and the sums of the rows in float64.
    """
    if alpha is None:
        return tensor
    if tensor.dtype == torch.float32:
        return tensor * alpha.expand(*tensor.shape[:-1], 1).to(tensor.dtype)
    return tensor * alpha

"""The parts that logits are the sum of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Parts(NamedTuple):
    """Operands of the logits, None where a part is absent; shapes as in `synthetic_attention`."""

    q: Tensor | None
    k: Tensor | None
    table: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def of_queries(self, rows: slice) -> Parts:
        """The operands of some queries; keys and the table stay."""
        q, left, right = (None if part is None else part[:, rows] for part in (self.q, self.left, self.right))
        return self._replace(q=q, left=left, right=right)

    def of_keys(self, cols: slice) -> Parts:
        """The operands of some keys."""
        return self if self.k is None else self._replace(k=self.k[:, cols])

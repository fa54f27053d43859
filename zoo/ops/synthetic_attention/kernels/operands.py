"""Operands as the kernels take them: strides, widths, and a stand-in for a part that is absent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.softmax_attention.kernels.tiles import rows_contiguous, strides, widths


class Operands(NamedTuple):
    """Tensors with a contiguous last axis. Absent ones are None."""

    v: Tensor
    q: Tensor | None
    k: Tensor | None
    table: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def pointers(self) -> tuple[Tensor, ...]:
        """v, q, k, table, left, right; v in place of an absent one, which is never looked at."""
        return tuple(self.v if tensor is None else tensor for tensor in self)

    def all_strides(self, packed: bool) -> tuple[int, ...]:
        """Batch, token and head strides of v, q, k, left, right; then head and row strides of the table."""
        each: list[int] = []
        for tensor in (self.v, self.q, self.k, self.left, self.right):
            each += (0, 0, 0) if tensor is None else strides(tensor, packed)
        return (*each, *((0, 0) if self.table is None else self.table.stride()[:2]))

    def sizes(self) -> dict[str, Any]:
        """The constants of a kernel: which parts are there, and how wide they are."""
        width = lambda tensor: 1 if tensor is None else tensor.shape[-1]
        n, p, a, b = width(self.q), width(self.v), width(self.left), width(self.right)
        return {
            "HAS_INNER": self.q is not None, "HAS_TABLE": self.table is not None, "HAS_OUTER": self.left is not None,
            "N": n, "P": p, "A": a, "COLUMNS": b,
            "BLOCK_N": widths(n), "BLOCK_P": widths(p), "BLOCK_A": widths(a), "BLOCK_B": widths(b),
        }  # fmt: skip

    def blocks(self) -> tuple[int, int]:
        """(tile edge, warps): smaller tiles for wider operands."""
        widest = max(value for name, value in self.sizes().items() if name.startswith("BLOCK"))
        if self.v.element_size() == 4:
            return (32, 4) if widest <= 128 else (16, 4)
        if widest <= 64:
            return 64, 4 if self.q is None or self.left is None else 8
        return (64, 8) if widest <= 128 else (32, 8)


def operands(*tensors: Tensor | None) -> Operands:
    """v, q, k, table, left, right with a contiguous last axis."""
    v, *parts = (None if tensor is None else rows_contiguous(tensor) for tensor in tensors)
    assert v is not None
    return Operands(v, *parts)


def table_sizes(table: Tensor | None) -> tuple[int, int]:
    """Rows and columns of the table [H,Lq,Lk]."""
    return (0, 0) if table is None else (table.shape[1], table.shape[2])


def fresh_like(tensor: Tensor | None, v: Tensor) -> Tensor:
    """A contiguous tensor for the gradient of an operand; one without elements if the operand is absent."""
    return torch.empty(0 if tensor is None else tensor.shape, dtype=v.dtype, device=v.device)

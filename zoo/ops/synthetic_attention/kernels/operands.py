"""Operands as the kernels take them: strides, widths, and a stand-in for a part that is absent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.kernels.rows import rows
from zoo.ops.softmax_attention.kernels.tiles import strides, wide_rows, widths


class Operands(NamedTuple):
    """Tensors with a contiguous last axis, of whole widths in half precision. Absent ones are None."""

    v: Tensor
    q: Tensor | None
    k: Tensor | None
    table: Tensor | None
    left: Tensor | None
    right: Tensor | None
    columns: int  # b, columns of `right` that have a meaning; 1 if it is absent

    def pointers(self) -> tuple[Tensor, ...]:
        """v, q, k, table, left, right; v in place of an absent one, which is never looked at."""
        each = (self.v, self.q, self.k, self.table, self.left, self.right)
        return tuple(self.v if tensor is None else tensor for tensor in each)

    def all_strides(self, packed: bool) -> tuple[int, ...]:
        """Batch, token and head strides of v, q, k, left, right; then head and row strides of the table."""
        each: list[int] = []
        for tensor in (self.v, self.q, self.k, self.left, self.right):
            each += (0, 0, 0) if tensor is None else strides(tensor, packed)
        return (*each, *((0, 0) if self.table is None else self.table.stride()[:2]))

    def sizes(self) -> dict[str, Any]:
        """The constants of a kernel: which parts are there, and how wide they are."""
        width = lambda tensor: 1 if tensor is None else tensor.shape[-1]
        n, p, a, c = width(self.q), width(self.v), width(self.left), width(self.right)
        return {
            "HAS_INNER": self.q is not None, "HAS_TABLE": self.table is not None, "HAS_OUTER": self.left is not None,
            "N": n, "P": p, "A": a, "C": c, "COLUMNS": self.columns,
            "BLOCK_N": widths(n), "BLOCK_P": widths(p), "BLOCK_A": widths(a), "BLOCK_C": widths(c),
        }  # fmt: skip

    def blocks(self) -> tuple[int, int]:
        """(tile edge, warps): smaller tiles for wider operands.

        With 4 warps the gradient of left, 64 rows from registers times 32 columns, was wrong on an H100 (Triton 3.6,
        whose assembler breaks up such products); 8 warps share them, in columns.
        """
        sizes = self.sizes()
        widest = max(value for name, value in sizes.items() if name.startswith("BLOCK"))
        if self.v.element_size() == 4:
            return (32, 4) if widest <= 128 else (16, 4)
        if widest > 64:
            return (64, 8) if widest <= 128 else (32, 8)
        shared = self.left is not None or 32 in (sizes["BLOCK_N"], sizes["BLOCK_P"])
        return 64, 8 if shared else 4


class Stats(NamedTuple):
    """What the backward knows of each query: float32 [B,H,Tq], contiguous.

    lse: log-sum-exp of its logits. delta: mean of dy v^T under its weights. share: 1 over the sum of the weights that
    lse gives; for half precision, which does without, any tensor of that dtype.
    """

    lse: Tensor
    delta: Tensor
    share: Tensor

    def strides(self, packed: bool) -> tuple[int, int]:
        """Batch and head strides of each."""
        return 0 if packed else self.lse.stride(0), self.lse.stride(1)


def operands(
    v: Tensor, q: Tensor | None, k: Tensor | None, table: Tensor | None, left: Tensor | None, right: Tensor | None
) -> Operands:
    """The operands as the kernels take them; all but the table are operands of matrix products."""
    columns = 1 if right is None else right.shape[-1]
    q, k, left, right = (None if part is None else wide_rows(part) for part in (q, k, left, right))
    table = None if table is None else rows(table)
    return Operands(wide_rows(v), q, k, table, left, right, columns)


def table_sizes(table: Tensor | None) -> tuple[int, int]:
    """Rows and columns of the table [H,Lq,Lk]."""
    return (0, 0) if table is None else (table.shape[1], table.shape[2])


def fresh_like(tensor: Tensor | None, v: Tensor) -> Tensor:
    """A contiguous tensor for the gradient of an operand; one without elements if the operand is absent."""
    return torch.empty(0 if tensor is None else tensor.shape, dtype=v.dtype, device=v.device)

"""Backward of synthetic attention: weights come again from the log-sum-exp, and each kind of operand has its kernel.

With w = softmax weights, dw = dy v^T and delta = sum_j w dw = sum_p dy y, the gradient of the logits is
ds = w (dw - delta). Then dq = ds k, dk = ds^T q, dv = w^T dy; dleft_i[r] and dright_i[c] sum ds times the other factor
over the keys of row r and column c; the table gathers ds over the sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.kernels.rows import rows
from zoo.ops.kernels.widths import cut_width
from zoo.ops.softmax_attention.kernels.tiles import wide_rows
from zoo.ops.synthetic_attention.kernels.backward_keys import backward_keys
from zoo.ops.synthetic_attention.kernels.backward_queries import backward_queries
from zoo.ops.synthetic_attention.kernels.backward_table import backward_table
from zoo.ops.synthetic_attention.kernels.operands import operands
from zoo.ops.synthetic_attention.kernels.row_stats import row_stats


def synthetic_backward(
    dy: Tensor,
    v: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    table: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    y: Tensor,
    lse: Tensor,
    spans: Tensor,
    causal: bool,
    packed: bool,
    of_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v, q, k, table, left and right; see `triton_path` for the arguments."""
    given, dy = operands(v, q, k, table, left, right), rows(dy)
    stats = row_stats(given, dy, y, lse.contiguous(), spans, causal, packed)
    shared = (given, wide_rows(dy), stats, spans, causal, packed)
    dq, dleft, dright = backward_queries(*shared)
    dk, dv = backward_keys(*shared)
    dtable = torch.empty(0, dtype=torch.float32, device=v.device)
    if of_table and table is not None:
        dtable = backward_table(*shared)
    dv, dq, dk, dleft, dright = (
        gradient if part is None else cut_width(gradient, part.shape[-1])
        for gradient, part in ((dv, v), (dq, q), (dk, k), (dleft, left), (dright, right))
    )
    return dv, dq, dk, dtable, dleft, dright

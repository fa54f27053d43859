"""Softmax of the rows of a matrix that a whole batch shares."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.primitives import exp
from zoo.ops.kernels.rows import rows
from zoo.ops.random_attention.kernels.tiles import row_block


@triton.jit
def _row_weights(
    table_ptr, weights_ptr,  # [H,Tq,Tk] -> [H,Tq,Tk]
    Tq, Tk, table_stride_h, table_stride_i,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns one row of one head; what the row does not see becomes 0."""
    i, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    table_at = table_ptr + head * table_stride_h + i * table_stride_i
    weights_at = weights_ptr + (head * Tq + i) * Tk
    stop = Tk
    if CAUSAL:
        stop = tl.minimum(Tk, i + 1 + Tk - Tq).to(tl.int32)
    tops = tl.full([BLOCK], float("-inf"), tl.float32)  # of each lane, and the sum below it
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, stop, BLOCK):
        j = start + tl.arange(0, BLOCK)
        logits = tl.load(table_at + j, mask=j < stop, other=float("-inf")).to(tl.float32)
        new_tops = tl.maximum(tops, logits)
        level = tl.where(new_tops == float("-inf"), 0.0, new_tops)
        sums = sums * exp(tops - level) + exp(logits - level)
        tops = new_tops
    top = tl.max(tops, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(sums * exp(tops - top), axis=0)
    scale = 1.0 / tl.where(total > 0.0, total, 1.0)
    for start in range(0, Tk, BLOCK):
        j = start + tl.arange(0, BLOCK)
        logits = tl.load(table_at + j, mask=j < stop, other=float("-inf")).to(tl.float32)
        weights = exp(logits - top) * scale
        tl.store(weights_at + j, weights.to(weights_ptr.dtype.element_ty), mask=j < Tk)


def row_weights(table: Tensor, dtype: torch.dtype, causal: bool) -> Tensor:
    """Weights [H,Tq,Tk] in `dtype`, contiguous; 0 where causality hides a key."""
    table = rows(table)
    heads, queries, keys = table.shape
    weights = torch.empty((heads, queries, keys), dtype=dtype, device=table.device)
    block = row_block(keys)
    _row_weights[(queries, heads)](
        table, weights, queries, keys, table.stride(0), table.stride(1),
        CAUSAL=causal, BLOCK=block, num_warps=block // 256 or 1,
    )  # fmt: skip
    return weights

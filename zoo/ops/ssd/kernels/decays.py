"""Gradients of the time steps, of A, of their bias and of the skip, from sums that the other kernels leave."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import LOG2E
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.semiseparable.kernels.chunks import LEAST, LEAST_STEP, Chunks, place_of, time_steps, token_rows


@launched(do_not_specialize=["T", "PER_SEQUENCE", "COUNT"])
def decays_kernel(
    dt_ptr, bias_ptr, A_ptr, row_ptr, col_ptr, kept_ptr, read_ptr, skip_ptr, flow_ptr, ddt_ptr, sums_ptr, table_ptr,
    T, PER_SEQUENCE, COUNT, stride, low, high,
    H: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr,
    Q: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, PLANES: tl.constexpr, BLOCK_H: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk of BLOCK_H heads: ddt [B,T,H] of the raw dt; sums [3,count,H]: of dA, of d dt_bias, of dD.

    The gradient of the log decay of token t counts the pairs i >= t > j. In the chunk: sums of rows i >= t less sums of
    columns j >= t. From before it into it: read. From it to behind it: kept of j < t. Over it: flow. Nothing cancels
    beyond a chunk.
    """
    chunk = tl.program_id(0)
    first, live = place_of(chunk, table_ptr, T, PER_SEQUENCE, Q, PACKED)
    i = tl.arange(0, Q)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    wanted = (i < live)[:, None] & (h < H)[None, :]
    at = (h[None, :].to(tl.int64) * COUNT + chunk) * Q + i[:, None]
    raw = tl.load(dt_ptr + (first + i)[:, None] * stride + h[None, :], mask=wanted, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    reached, step = time_steps(raw, HAS_SOFTPLUS, low, high)
    rate = tl.load(A_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    plane = tl.full([1], H, tl.int64) * COUNT * Q
    row = tl.load(row_ptr + at, mask=wanted, other=0.0)
    for across in tl.static_range(1, Q // BLOCK_J):
        reached_by = i // BLOCK_I * BLOCK_I + BLOCK_I > across * BLOCK_J
        row += tl.load(row_ptr + across * plane + at, mask=wanted & reached_by[:, None], other=0.0)
    col = tl.zeros([Q, BLOCK_H], tl.float32)
    for down in tl.static_range(0, Q // BLOCK_I):
        above = i // BLOCK_I <= down
        col += tl.load(col_ptr + down * plane + at, mask=wanted & above[:, None], other=0.0)
    row += tl.load(read_ptr + at, mask=wanted, other=0.0)
    kept = tl.load(kept_ptr + at, mask=wanted, other=0.0)
    places = h.to(tl.int64) * COUNT + chunk
    flow = tl.load(flow_ptr + places, mask=h < H, other=0.0)
    for part in tl.static_range(1, PLANES):
        row += tl.load(read_ptr + part * plane + at, mask=wanted, other=0.0)
        kept += tl.load(kept_ptr + part * plane + at, mask=wanted, other=0.0)
        flow += tl.load(flow_ptr + part * (plane // Q) + places, mask=h < H, other=0.0)
    dstep = col / tl.maximum(step, LEAST_STEP, propagate_nan=tl.PropagateNan.ALL) + kept
    kept = tl.where(wanted, kept * step, 0.0)
    change = tl.cumsum(row - col, axis=0, reverse=True) + (tl.cumsum(kept, axis=0) - kept)
    change += flow[None, :]
    felt = wanted & (step * rate[None, :] * LOG2E > LEAST)
    change = tl.where(felt, change, 0.0)
    dstep += change * rate[None, :]
    if HAS_SOFTPLUS:
        dstep *= 1.0 / (1.0 + tl.exp(-raw))
    ddt = tl.where(wanted & (reached >= low) & (reached <= high), dstep, 0.0)
    out = (first + i)[:, None] * H + h[None, :]
    tl.store(ddt_ptr + out, ddt.to(ddt_ptr.dtype.element_ty), mask=wanted)
    place = chunk.to(tl.int64) * H + h
    size = tl.full([1], COUNT, tl.int64) * H
    tl.store(sums_ptr + place, tl.sum(tl.where(felt, change * step, 0.0), 0), mask=h < H)
    tl.store(sums_ptr + size + place, tl.sum(ddt, 0), mask=h < H)
    if HAS_D:
        skip = tl.load(skip_ptr + at, mask=wanted, other=0.0)
        tl.store(sums_ptr + 2 * size + place, tl.sum(skip, 0), mask=h < H)


def decays(
    chunks: Chunks, dt: Tensor, A: Tensor, bias: Tensor | None, has_softplus: bool, limits: tuple[float, float],
    row: Tensor, col: Tensor, kept: Tensor, read: Tensor, skip: Tensor | None, flow: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """ddt [B,T,H] in the dtype of dt; dA, and with a bias its gradient, and with a skip dD, float32 [H].

    Sums as `pairs` and `keys` leave them; the planes of kept, read [planes,H,count,Q] and flow [planes,H,count] add up.
    """
    heads = dt.shape[2]
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    sums = torch.empty(3, chunks.count, heads, dtype=torch.float32, device=dt.device)
    dt, stride = token_rows(dt)
    block = min(8, next_power_of_2(heads))
    decays_kernel[(chunks.count, cdiv(heads, block))](
        dt, A if bias is None else bias, A, row, col, kept, read, kept if skip is None else skip, flow, ddt, sums,
        chunks.table, chunks.tokens, chunks.per_sequence, chunks.count, stride, *limits,
        H=heads, HAS_BIAS=bias is not None, HAS_SOFTPLUS=has_softplus, HAS_D=skip is not None,
        Q=chunks.size, BLOCK_I=chunks.size // col.shape[0], BLOCK_J=chunks.size // row.shape[0],
        PLANES=read.shape[0], BLOCK_H=block, PACKED=chunks.packed, num_warps=4,
    )  # fmt: skip
    dbias, dD = (None if part is None else sums[i].sum(0) for part, i in ((bias, 1), (skip, 2)))
    return ddt, sums[0].sum(0), dbias, dD

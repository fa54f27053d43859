"""States at the borders of the chunks, and the gradients of states, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import dot
from zoo.ops.semiseparable.kernels.chunks import Chunks, place_of, tile, token_rows


@triton.jit
def _sweep(
    value_ptr, key_ptr, s_ptr, factor_ptr, start_ptr, states_ptr, end_ptr, table_ptr, first_ptr,
    sequence, h, n0, p0, T, PER_SEQUENCE, COUNT, value_stride, key_stride,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    Q: tl.constexpr, HAS_START: tl.constexpr, KEEP: tl.constexpr, BACK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, Q)
    n = n0 + tl.arange(0, BLOCK_N)
    p = p0 + tl.arange(0, BLOCK_P)
    outer = ((sequence * H + h) * P + p[None, :]) * N + n[:, None]
    if HAS_START:
        state = tl.load(start_ptr + outer).to(tl.float32)
    else:
        state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if PACKED:
        begin = tl.load(first_ptr + sequence)
        end = tl.load(first_ptr + sequence + 1)
    else:
        begin = (sequence * PER_SEQUENCE).to(tl.int32)
        end = begin + PER_SEQUENCE
    for step in range(0, end - begin):
        chunk = begin + step
        if BACK:
            chunk = end - 1 - step
        slot = chunk.to(tl.int64) * H + h
        tl.store(states_ptr + (slot * N + n[:, None]) * P + p[None, :], state.to(states_ptr.dtype.element_ty))
        first, live = place_of(chunk, table_ptr, T, PER_SEQUENCE, Q, PACKED)
        key = tile(key_ptr, first, live, key_stride, h // (H // G) * N + n0, i, BLOCK_N)
        value = tile(value_ptr, first, live, value_stride, h * P + p0, i, BLOCK_P)
        sums = (h.to(tl.int64) * COUNT + chunk) * Q
        last = tl.load(s_ptr + sums + Q - 1)
        if BACK:
            factor = tl.exp2(tl.load(factor_ptr + sums + i))
        else:
            factor = tl.exp2(last - tl.load(factor_ptr + sums + i))
        state = dot(tl.trans(key), (value * factor[:, None]).to(key.dtype), state * tl.exp2(last))
    if KEEP:
        tl.store(end_ptr + outer, state)


@launched(do_not_specialize=["T", "PER_SEQUENCE", "COUNT"])
def sweep_kernel(
    x_ptr, dy_ptr, B_ptr, C_ptr, s_ptr, r_ptr,  # [B,T,H,P] twice, [B,T,G,N] twice, [H,count,Q] twice
    start_ptr, dfinal_ptr,  # [S,H,P,N]
    S_ptr, R_ptr, dstart_ptr,  # -> [count,H,N,P] twice, [S,H,P,N] if HAS_START
    table_ptr, first_ptr, T, PER_SEQUENCE, COUNT, x_stride, dy_stride, B_stride, C_stride,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    Q: tl.constexpr, HAS_START: tl.constexpr, HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows and BLOCK_P columns of the state of one head of one sequence, in one direction.

    Axis 1 of the grid: 0 for S, the states that enter the chunks, 1 for R, the gradients of those that leave.
    """
    blocks: tl.constexpr = (N // BLOCK_N) * (P // BLOCK_P)
    sequence = (tl.program_id(0) // (H * blocks)).to(tl.int64)
    h = tl.program_id(0) // blocks % H
    n0 = tl.program_id(0) % blocks // (P // BLOCK_P) * BLOCK_N
    p0 = tl.program_id(0) % (P // BLOCK_P) * BLOCK_P
    if tl.program_id(1) == 0:
        _sweep(x_ptr, B_ptr, s_ptr, r_ptr, start_ptr, S_ptr, dstart_ptr, table_ptr, first_ptr, sequence, h, n0, p0,
               T, PER_SEQUENCE, COUNT, x_stride, B_stride,
               H, G, N, P, BLOCK_N, BLOCK_P, Q, HAS_START, False, False, PACKED)  # fmt: skip
    else:
        _sweep(dy_ptr, C_ptr, s_ptr, s_ptr, dfinal_ptr, R_ptr, dstart_ptr, table_ptr, first_ptr, sequence, h, n0, p0,
               T, PER_SEQUENCE, COUNT, dy_stride, C_stride,
               H, G, N, P, BLOCK_N, BLOCK_P, Q, HAS_DFINAL, HAS_START, True, PACKED)  # fmt: skip


def sweep(
    chunks: Chunks, x: Tensor, dy: Tensor, B: Tensor, C: Tensor, s: Tensor, r: Tensor,
    start: Tensor | None, dfinal: Tensor | None, options: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """S and R [count,H,N,P] in the dtype of x; with a start its gradient [S,H,P,N], float32."""
    heads, channels = x.shape[2:]
    groups, modes = B.shape[2:]
    block_n, block_p = min(options["BLOCK_N"], modes), min(options["BLOCK_P"], channels)
    S = torch.empty(chunks.count, heads, modes, channels, dtype=x.dtype, device=x.device)
    R, dstart = torch.empty_like(S), None if start is None else torch.empty_like(start)
    (x, x_stride), (dy, dy_stride), (B, B_stride), (C, C_stride) = (token_rows(part) for part in (x, dy, B, C))
    blocks = (modes // block_n) * (channels // block_p)
    sweep_kernel[(chunks.sequences * heads * blocks, 2)](
        x, dy, B, C, s, r, s if start is None else start, s if dfinal is None else dfinal,
        S, R, s if dstart is None else dstart, chunks.table, chunks.first,
        chunks.tokens, chunks.per_sequence, chunks.count, x_stride, dy_stride, B_stride, C_stride,
        H=heads, G=groups, N=modes, P=channels, BLOCK_N=block_n, BLOCK_P=block_p, Q=chunks.size,
        HAS_START=start is not None, HAS_DFINAL=dfinal is not None, PACKED=chunks.packed,
        num_warps=options["num_warps"], num_stages=options["num_stages"],
    )  # fmt: skip
    return S, R, dstart

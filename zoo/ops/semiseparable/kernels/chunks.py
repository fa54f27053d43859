"""Where chunks lie in the tokens, their tiles, and the sums of decays inside them.

Notation of these kernels: chunks of Q tokens; s_i sums of log2 decays inside a chunk, up to and with token i;
r_j = s_j - log2 dt_j; e = s at the chunk's end. Tokens of all sequences are numbered through, [B T].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import LOG2E
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.kernels.time_step import softplus

LEAST = tl.constexpr(-160.0)  # log2 of a decay; a factor below 2^-149 is 0 in float32 anyway
LEAST_STEP = tl.constexpr(2.0**-60)  # what stands for smaller time steps where r must be finite
FARTHEST = 2**23  # elements from token to token


@dataclass(frozen=True)
class Chunks:
    """Chunks of Q tokens of `sequences` sequences; none holds tokens of two.

    count: chunks, some of which may be empty if packed. per_sequence: chunks of each one, 0 if packed.
    table: int32 [count,2], first token and number of tokens of each chunk, if packed. first: int32 [S+1], the first
    chunk of each sequence, if packed.
    """

    tokens: int
    sequences: int
    size: int
    count: int
    per_sequence: int
    table: Tensor
    first: Tensor
    packed: bool

    def per_token(self, heads: int) -> Tensor:
        """Uninitialised float32 [H,count,Q]."""
        return torch.empty(heads, self.count, self.size, dtype=torch.float32, device=self.table.device)


def chunks_of(x: Tensor, cu_seqlens: Tensor | None, size: int) -> Chunks:
    """x: [B,T,...]. Nothing here waits for the device."""
    batch, tokens = x.shape[:2]
    if cu_seqlens is None:
        per_sequence = -(-tokens // size)
        nothing = torch.empty(0, dtype=torch.int32, device=x.device)
        return Chunks(tokens, batch, size, batch * per_sequence, per_sequence, nothing, nothing, False)
    bounds = cu_seqlens.to(torch.int64)
    sequences = bounds.numel() - 1
    first = torch.zeros_like(bounds)
    torch.cumsum((bounds.diff() + size - 1) // size, 0, out=first[1:])
    count = tokens // size + sequences
    place = torch.arange(count, device=x.device)
    owner = torch.searchsorted(first[1:].contiguous(), place, right=True).clamp(max=sequences - 1)
    start = torch.minimum(bounds[owner] + (place - first[owner]) * size, bounds[owner + 1])
    table = torch.stack((start, (bounds[owner + 1] - start).clamp(0, size)), 1).to(torch.int32)
    return Chunks(tokens, sequences, size, count, 0, table, first.to(torch.int32), True)


def token_rows(part: Tensor) -> tuple[Tensor, int]:
    """`part` [B,T,...] and its elements from token to token, one stride for all tokens; copied if that cannot be.

    Copied as well if that stride is FARTHEST or more: offsets in one chunk are 32 bits wide.
    """
    shape, steps, inner = part.shape, part.stride(), 1
    for size, step in zip(shape[:1:-1], steps[:1:-1], strict=True):
        if step != inner and size != 1:
            part = part.contiguous()
            return part, part.stride(1)
        inner *= size
    if steps[1] >= FARTHEST or (shape[0] > 1 and steps[0] != shape[1] * steps[1]):
        part = part.contiguous()
        return part, part.stride(1)
    return part, steps[1]


@triton.jit
def place_of(chunk, table_ptr, T, PER_SEQUENCE, Q: tl.constexpr, PACKED: tl.constexpr):
    """First token (int64) and number of tokens of a chunk."""
    if PACKED:
        first = tl.load(table_ptr + 2 * chunk).to(tl.int64)
        live = tl.load(table_ptr + 2 * chunk + 1)
    else:
        inside = chunk % PER_SEQUENCE * Q
        first = (chunk // PER_SEQUENCE).to(tl.int64) * T + inside
        live = tl.minimum(T - inside, Q)
    return first, live


@triton.jit
def tile(ptr, first, live, stride, column, row, W: tl.constexpr):
    """Rows `row` of a chunk and W columns from `column` of a tensor of tokens; zeros from row `live` on."""
    at = row[:, None] * stride + tl.arange(0, W)[None, :]  # the same in all chunks
    return tl.load(ptr + (first * stride + column) + at, mask=(row < live)[:, None], other=0.0)


@triton.jit
def time_steps(raw, HAS_SOFTPLUS: tl.constexpr, low, high):
    """Time steps of raw ones, before and after the clamp."""
    reached = raw
    if HAS_SOFTPLUS:
        reached = softplus(raw)
    clamped = tl.minimum(
        tl.maximum(reached, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL
    )
    return reached, clamped


@triton.jit
def store_sums(
    dt_ptr, bias_ptr, A_ptr, s_ptr, r_ptr, chunk, h, first, live, stride, COUNT, low, high,
    H: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTPLUS: tl.constexpr, Q: tl.constexpr, FINITE: tl.constexpr,
):  # fmt: skip
    """s and r of one chunk and the heads h. Beyond the chunk's tokens s stays, and the time step is 0.

    r of a time step of 0 is +inf; if FINITE, that of LEAST_STEP.
    """
    i = tl.arange(0, Q)
    wanted = (i < live)[:, None] & (h < H)[None, :]
    raw = tl.load(dt_ptr + (first + i)[:, None] * stride + h[None, :], mask=wanted, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    _, step = time_steps(raw, HAS_SOFTPLUS, low, high)
    step = tl.where(wanted, step, 0.0)
    rate = tl.load(A_ptr + h, mask=h < H, other=0.0).to(tl.float32) * LOG2E
    s = tl.cumsum(tl.maximum(step * rate[None, :], LEAST, propagate_nan=tl.PropagateNan.ALL), axis=0)
    if FINITE:
        r = s - tl.log2(tl.maximum(step, LEAST_STEP, propagate_nan=tl.PropagateNan.ALL))
    else:
        r = tl.where(step == 0.0, float("inf"), s - tl.log2(tl.where(step == 0.0, 1.0, step)))
    at = (h[None, :].to(tl.int64) * COUNT + chunk) * Q + i[:, None]
    tl.store(s_ptr + at, s, mask=(h < H)[None, :] & (i >= 0)[:, None])
    tl.store(r_ptr + at, r, mask=(h < H)[None, :] & (i >= 0)[:, None])


@launched(do_not_specialize=["T", "PER_SEQUENCE", "COUNT"])
def sums_kernel(
    dt_ptr, bias_ptr, A_ptr, table_ptr, s_ptr, r_ptr,  # [B,T,H] [H] [H] -> [H,count,Q] twice
    T, PER_SEQUENCE, COUNT, stride, low, high,
    H: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTPLUS: tl.constexpr,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, PACKED: tl.constexpr, FINITE: tl.constexpr,
):  # fmt: skip
    """One program owns one chunk of BLOCK_H heads."""
    chunk = tl.program_id(0)
    first, live = place_of(chunk, table_ptr, T, PER_SEQUENCE, Q, PACKED)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    store_sums(dt_ptr, bias_ptr, A_ptr, s_ptr, r_ptr, chunk, h, first, live, stride, COUNT, low, high,
               H, HAS_BIAS, HAS_SOFTPLUS, Q, FINITE)  # fmt: skip


def decay_sums(
    chunks: Chunks, dt: Tensor, A: Tensor, bias: Tensor | None, has_softplus: bool, limits: tuple[float, float],
    finite: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """s and r, float32 [H,count,Q]. dt: [B,T,H] raw; A, bias: float32 [H]. finite: see the kernel."""
    heads = dt.shape[2]
    s, r = chunks.per_token(heads), chunks.per_token(heads)
    dt, stride = token_rows(dt)
    block = min(16, next_power_of_2(heads))
    sums_kernel[(chunks.count, cdiv(heads, block))](
        dt, A if bias is None else bias, A, chunks.table, s, r,
        chunks.tokens, chunks.per_sequence, chunks.count, stride, *limits,
        H=heads, HAS_BIAS=bias is not None, HAS_SOFTPLUS=has_softplus,
        Q=chunks.size, BLOCK_H=block, PACKED=chunks.packed, FINITE=finite, num_warps=4,
    )  # fmt: skip
    return s, r

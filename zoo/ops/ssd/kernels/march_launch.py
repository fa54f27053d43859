"""Launches the march: which sizes it serves, the one table of its blocks, and what is made before it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import Constants, start
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.semiseparable.kernels.chunks import Chunks, chunks_of, token_rows
from zoo.ops.ssd.kernels.march import before_kernel, march_kernel


class Blocks(NamedTuple):
    chunk: int  # tokens of a chunk
    rows: int  # channels of one program, 64 for each 4 warps
    parts: int  # register tiles of its state
    warps: int
    stages: int
    overlap: bool = True  # whether the product that fills the state runs beside the next chunk's weights
    registers: int | None = None  # most of a thread
    scores: torch.dtype = torch.float32  # in which scores wait for the march


# By the widest state.
TABLE = {
    16: Blocks(32, 64, 1, 4, 3),
    64: Blocks(32, 64, 1, 4, 3, overlap=False, registers=128),
    128: Blocks(32, 64, 1, 4, 3, overlap=False),
    256: Blocks(32, 64, 2, 4, 2, overlap=False),
}


@lru_cache
def blocks_for(modes: int) -> Blocks:
    return next(blocks for widest, blocks in TABLE.items() if modes <= widest)


def serves(x: Tensor, B: Tensor) -> bool:
    """Whether x [B,T,H,P] and B [B,T,G,N] are for the march: rows of wgmma are 64, channels of one head or of two.

    Fewer channels leave rows empty; beside more than 128 modes that is still less work than a walk.
    """
    (heads, channels), (groups, width) = x.shape[2:], B.shape[2:]
    filled = channels > 32 or (channels == 32 and heads // groups % 2 == 0)
    return x.dtype == torch.bfloat16 and width <= max(TABLE) and width % 16 == 0 and (filled or width > 128)


def programs(blocks: Blocks, heads: int, groups: int, channels: int) -> int:
    """Of a march along one sequence."""
    together = _together(blocks, heads, groups, channels)
    return heads // together * cdiv(channels * together, blocks.rows)


def _together(blocks: Blocks, heads: int, groups: int, channels: int) -> int:
    """Heads of one program."""
    return 2 if blocks.rows == 2 * channels and heads // groups % 2 == 0 else 1


class Before(NamedTuple):
    """Sums s and r of decays, float32 [H,count,Q], and scores of the groups, [count,G,Q,Q], of all chunks."""

    s: Tensor
    r: Tensor
    scores: Tensor


def before(
    chunks: Chunks, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor | None, has_softplus: bool,
    limits: tuple[float, float], dtype: torch.dtype,
) -> Before:  # fmt: skip
    """dt: [B,T,H] raw; A, bias: float32 [H]. dtype: of the scores."""
    heads, (groups, width) = dt.shape[2], B.shape[2:]
    s, r = chunks.per_token(heads), chunks.per_token(heads)
    scores = torch.empty((chunks.count, groups, chunks.size, chunks.size), dtype=dtype, device=dt.device)
    (dt, stride), (B, B_stride), (C, C_stride) = token_rows(dt), token_rows(B), token_rows(C)
    block = min(16, next_power_of_2(heads))
    before_kernel[(chunks.count, groups + cdiv(heads, block))](
        dt, A if bias is None else bias, A, B, C, chunks.table, s, r, scores,
        chunks.tokens, chunks.per_sequence, chunks.count, stride, B_stride, C_stride, *limits,
        H=heads, G=groups, N=width, HAS_BIAS=bias is not None, HAS_SOFTPLUS=has_softplus,
        Q=chunks.size, BLOCK_H=block, BLOCK_N=next_power_of_2(width), PACKED=chunks.packed, num_warps=4,
    )  # fmt: skip
    return Before(s, r, scores)


def whole(chunks: Chunks) -> bool:
    """Whether every chunk is full."""
    return not chunks.packed and chunks.tokens % chunks.size == 0


FLAGS = ("HAS_D", "HAS_START", "PACKED", "EVEN", "SAME")


@lru_cache(maxsize=256)
def _constants(blocks: Blocks, H: int, G: int, N: int, P: int, *flags: bool) -> Constants:
    """Constants and options of a launch. flags: values of FLAGS."""
    register = {} if blocks.registers is None else {"maxnreg": blocks.registers}
    return Constants({
        "H": H, "G": G, "N": N, "P": P, "Q": blocks.chunk, "ROWS": blocks.rows, "HEADS": _together(blocks, H, G, P),
        "WIDTH": next_power_of_2(N) // blocks.parts, "PARTS": blocks.parts, "OVERLAP": blocks.overlap,
        **dict(zip(FLAGS, flags, strict=True)), "num_warps": blocks.warps, "num_stages": blocks.stages, **register,
    })  # fmt: skip


def march(
    x: Tensor, B: Tensor, C: Tensor, made: Before, D: Tensor | None, begin: Tensor | None,
    cu_seqlens: Tensor | None, first: Tensor | None, even: bool, y: Tensor, final: Tensor, blocks: Blocks,
) -> None:  # fmt: skip
    """Fill y [B,T,H,P] and the final state [S,H,P,N], both contiguous; begin: float32 [S,H,P,N], contiguous.

    cu_seqlens: bounds of packed sequences in tokens, with `first`, their first chunks. even: every chunk is full.
    """
    (tokens, heads, channels), (groups, width) = x.shape[1:], B.shape[2:]
    (x, x_stride), (B, B_stride), (C, C_stride) = token_rows(x), token_rows(B), token_rows(C)
    constants = _constants(
        blocks, heads, groups, width, channels,
        D is not None, begin is not None, cu_seqlens is not None, even, B_stride == C_stride,
    )  # fmt: skip
    start(
        march_kernel, (final.shape[0] * programs(blocks, heads, groups, channels),), constants,
        x, B, C, made.s, made.r, made.scores, D, begin, cu_seqlens, first, y, final,
        tokens, cdiv(tokens, blocks.chunk), made.s.shape[1], x_stride, B_stride, C_stride,
    )  # fmt: skip


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    has_softplus: bool, limits: tuple[float, float], begin: Tensor | None, cu_seqlens: Tensor | None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B,T,H,P] and the final state [S,H,P,N], float32. A, D, dt_bias: float32 [H]; begin: float32 [S,H,P,N].

    See `serves`; time steps are not negative.
    """
    blocks = blocks or blocks_for(B.shape[3])
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    chunks = chunks_of(x, cu_seqlens, blocks.chunk)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty((chunks.sequences, *x.shape[2:], B.shape[3]), dtype=torch.float32, device=x.device)
    begin = None if begin is None else begin.contiguous()
    with on_device(x):
        made = before(chunks, dt, A, B, C, dt_bias, has_softplus, limits, blocks.scores)
        first = chunks.first if chunks.packed else None
        march(x, B, C, made, D, begin, cu_seqlens, first, whole(chunks), y, final, blocks)
    return y, final

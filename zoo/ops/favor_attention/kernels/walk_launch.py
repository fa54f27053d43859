"""Launches the causal walks in bfloat16, with blocks from one table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.ops.favor_attention.kernels.rows import combine_kernel, half_square_kernel
from zoo.ops.favor_attention.kernels.walk_gradient import walk_gradient_kernel
from zoo.ops.favor_attention.kernels.walk_read import walk_read_kernel
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.semiseparable.kernels.launch import strides

ROWS = 32  # rows of a program of the row kernel
# By kernel: tokens of a chunk, features of a program at most, chunks of a run, warps, stages. The lean walks serve
# where they can; SHARE: their programs of a multiprocessor; AHEAD: whether they ask for the next chunk.
TABLE: dict[str, dict[str, Any]] = {
    "read": {"CHUNK": 64, "BLOCK_M": 128, "RUN": 32, "num_warps": 4, "num_stages": 1},
    "gradient": {"CHUNK": 64, "BLOCK_M": 64, "RUN": 32, "num_warps": 4, "num_stages": 1},
    "lean_read": {"CHUNK": 128, "BLOCK_M": 128, "SHARE": 1, "RUN": 32, "AHEAD": True, "num_warps": 8, "num_stages": 1},
    "lean_gradient": {
        "CHUNK": 64, "BLOCK_M": 64, "SHARE": 2, "RUN": 32, "AHEAD": False, "num_warps": 4, "num_stages": 1,
    },
}  # fmt: skip
NARROWEST, WIDEST = 64, 128  # heads; tiles of 16 columns gave a wrong gradient of v on an H100 (Triton 3.6)
FEWEST = 64  # features


def serves(width: int, channels: int, count: int, dtype: torch.dtype) -> bool:
    """Whether the walks serve heads of these widths and so many features.

    They want whole tensor-core tiles of at least 64 columns, and states that fit in registers.
    """
    if dtype != torch.bfloat16 or width % 16 or channels % 16:
        return False
    return min(width, channels) >= NARROWEST and max(width, channels) <= WIDEST and count >= FEWEST


@dataclass(frozen=True)
class Walk:
    """What the launches of one call share. hi, lo, rows: [M,N], half: [B,T,G], see the kernels.

    The projection comes in float16, for ReLU features as a sum of two parts in bfloat16.
    """

    hi: Tensor
    lo: Tensor
    rows: Tensor
    half: Tensor
    starts: Tensor
    ends: Tensor
    heads: int
    half_scale: float
    feature_eps: float
    constants: dict[str, Any]
    table: dict[str, dict[str, Any]]

    def blocks(self, kernel: str) -> dict[str, Any]:
        """Constants of one kernel."""
        chosen = self.table[kernel]
        fitting = max(16, next_power_of_2(self.constants["M"]))
        narrow = min(self.constants["BLOCK_N"], self.constants["BLOCK_P"], fitting) <= 32
        stages = 2 if narrow else chosen["num_stages"]  # one stage is miscompiled at 32 columns
        return self.constants | chosen | {"BLOCK_M": min(chosen["BLOCK_M"], fitting), "num_stages": stages}

    def slices(self, kernel: str) -> int:
        """Programs that share a head's features."""
        return int(cdiv(self.constants["M"], self.blocks(kernel)["BLOCK_M"]))


def walk_of(
    k: Tensor, projection: Tensor, starts: Tensor, ends: Tensor, heads: int, channels: int, relu: bool,
    feature_eps: float,
) -> Walk:  # fmt: skip
    """k: [B,T,G,N]; projection: [M,N]; starts, ends: int64 [S]."""
    count, width = projection.shape
    scaled = projection.float() * width**-0.25
    unit = 1.0 if relu else math.log2(math.e)
    binary = scaled * unit
    # The slope of a ReLU jumps where <w, x'> changes its sign: that wants more digits of w than an exponent.
    hi = binary.to(torch.bfloat16 if relu else torch.float16)
    lo = (binary - hi.float()).to(hi.dtype)
    constants = {
        "H": heads, "M": count, "N": width, "P": channels, "RELU": relu, "SPLIT": relu,
        "BLOCK_N": max(16, next_power_of_2(width)), "BLOCK_P": max(16, next_power_of_2(channels)),
    }  # fmt: skip
    half_scale, groups = 0.5 * width**-0.5 * unit, k.shape[2]
    half = torch.empty(k.shape[:3], dtype=torch.float32, device=k.device)
    half_square_kernel[(cdiv(half.numel(), ROWS),)](
        k, half, half.numel(), half_scale, *strides(k), G=groups, N=width, ROWS=ROWS, BLOCK_N=constants["BLOCK_N"]
    )
    return Walk(
        hi.contiguous(), lo.contiguous(), binary.to(torch.bfloat16).contiguous(), half, starts, ends, heads,
        half_scale, feature_eps, constants, dict(TABLE),
    )  # fmt: skip


def read_walk(
    walk: Walk, reader: Tensor, writer: Tensor, payload: Tensor, log_total: Tensor | None,
    first: Tensor | None, last: Tensor, y: Tensor | None, y_log: Tensor | None,
) -> Tensor:  # fmt: skip
    """Outputs (into y and y_log), or the gradients of v for every query head [B,T,H,P] if `y` is None: in reverse."""
    reverse, slices = y is None, walk.slices("read")
    batch, tokens = reader.shape[:2]
    shape = (slices, batch, tokens, walk.heads, payload.shape[3])
    one = slices == 1
    out = y if y is not None and one else torch.empty(shape, dtype=payload.dtype, device=reader.device)
    logs = y_log if y_log is not None and one else torch.empty(shape[:4], dtype=torch.float32, device=reader.device)
    walk_read_kernel[(walk.starts.shape[0] * walk.heads, slices)](
        reader, writer, payload, walk.hi, walk.lo, walk.half, log_total, first, last, walk.starts, walk.ends, out, logs,
        batch * tokens, walk.feature_eps, *strides(reader, writer, payload),
        J_READER=walk.heads // reader.shape[2], J_WRITER=walk.heads // writer.shape[2],
        J_PAYLOAD=walk.heads // payload.shape[2],
        REVERSE=reverse, HAS_FIRST=first is not None, EMPTY_LOG=float("inf") if one else float("-inf"),
        **walk.blocks("read"),
    )  # fmt: skip
    if y is None:
        return added(out)
    if not one:
        rows = y.numel() // y.shape[3]
        combine_kernel[(cdiv(rows, ROWS),)](
            out, logs, y, y_log, rows, slices, P=y.shape[3], ROWS=ROWS, BLOCK_P=walk.constants["BLOCK_P"]
        )
    return y


def gradient_walk(
    walk: Walk, reader: Tensor, writer: Tensor, beside: Tensor, payload: Tensor, log_total: Tensor, delta: Tensor,
    first: Tensor | None, last: Tensor, *, reverse: bool,
) -> Tensor:  # fmt: skip
    """Gradient of the reader for every query head, [B,T,H,N]; in reverse the last state is stored."""
    batch, tokens, _, width = reader.shape
    slices = walk.slices("gradient")
    grad = torch.empty((slices, batch, tokens, walk.heads, width), dtype=reader.dtype, device=reader.device)
    walk_gradient_kernel[(walk.starts.shape[0] * walk.heads, slices)](
        reader, writer, beside, payload, walk.hi, walk.lo, walk.rows, walk.half, log_total, delta, first, last,
        walk.starts, walk.ends, grad, batch * tokens, walk.half_scale, walk.feature_eps,
        *strides(reader, writer, beside, payload),
        J_READER=walk.heads // reader.shape[2], J_WRITER=walk.heads // writer.shape[2],
        REVERSE=reverse, HAS_FIRST=first is not None, **walk.blocks("gradient"),
    )  # fmt: skip
    return added(grad)


def added(parts: Tensor) -> Tensor:
    """The sum over slices [slices,...], added up in float32 and rounded once."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)

"""Launches the lean walks, with blocks from the table of the walks."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.ops.favor_attention.kernels.rows import combine_kernel
from zoo.ops.favor_attention.kernels.walk_launch import TABLE
from zoo.ops.favor_attention.kernels.walk_lean import LANES
from zoo.ops.favor_attention.kernels.walk_lean_gradient import lean_gradient_kernel
from zoo.ops.favor_attention.kernels.walk_lean_read import lean_read_kernel
from zoo.ops.favor_attention.kernels.walk_lean_rows import beside_keys_kernel, beside_queries_kernel, gather_kernel
from zoo.ops.kernels.rows import cdiv

ROWS = 32  # rows of a program of the row kernels
WIDTH = 128  # of heads
KERNELS = ("lean_read", "lean_gradient")


def serves_lean(width: int, channels: int, count: int, dtype: torch.dtype, relu: bool) -> bool:
    """Whether the lean walks serve heads of these widths and so many features."""
    fits = all(count % (TABLE[kernel]["SHARE"] * TABLE[kernel]["BLOCK_M"]) == 0 for kernel in KERNELS)
    return dtype == torch.bfloat16 and width == channels == WIDTH and fits and not relu


@dataclass(frozen=True)
class LeanWalk:
    """What the launches of one call share. weights, rows: [M,N]; beside: [B,T,G,LANES] of the keys, see the kernels."""

    weights: Tensor
    rows: Tensor
    beside: Tensor
    starts: Tensor
    ends: Tensor
    heads: int
    count: int
    table: dict[str, dict[str, Any]]

    def parts(self, kernel: str) -> int:
        """Programs that share a head's features."""
        return int(self.count // self.table[kernel]["BLOCK_M"])

    def grid(self, kernel: str) -> tuple[int, int]:
        """Programs, and multiprocessors: see `seat`."""
        share = self.table[kernel]["SHARE"]
        groups = self.starts.shape[0] * self.heads * self.parts(kernel) // share
        width = max(1, min(multiprocessors(self.starts.device), groups))
        return cdiv(groups, width) * width * share, width

    def constants(self, kernel: str, **named: Tensor) -> dict[str, Any]:
        """Constants of a launch; named: tensors whose stride between tokens is one."""
        strides = {f"{name.upper()}_STRIDE": x.stride(1) for name, x in named.items()}
        own = {"H": self.heads, "M": self.count, "N": WIDTH, "P": WIDTH}
        return own | strides | self.table[kernel]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def lean_walk(k: Tensor, projection: Tensor, starts: Tensor, ends: Tensor, heads: int) -> LeanWalk:
    """k: [B,T,G,N]; projection: [M,N]; starts, ends: int64 [S]."""
    scaled = projection.float() * WIDTH**-0.25
    binary = scaled * math.log2(math.e)
    beside = torch.empty((*k.shape[:3], LANES.value), dtype=torch.bfloat16, device=k.device)
    rows = k.shape[0] * k.shape[1] * k.shape[2]
    half_scale = 0.5 * WIDTH**-0.5 * math.log2(math.e)
    beside_keys_kernel[(cdiv(rows, ROWS),)](
        k, beside, rows, half_scale, k.stride(1), k.stride(2), G=k.shape[2], N=WIDTH, ROWS=ROWS
    )
    return LeanWalk(
        binary.to(torch.float16).contiguous(), scaled.to(torch.bfloat16).contiguous(), beside, starts, ends, heads,
        projection.shape[0], dict(TABLE),
    )  # fmt: skip


def lean_forward(
    walk: LeanWalk, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, last: Tensor, y: Tensor, y_log: Tensor
) -> None:  # fmt: skip
    """Outputs into y and y_log, the final state into `last`."""
    parts = walk.parts("lean_read")
    out = torch.empty((parts, *y.shape), dtype=y.dtype, device=y.device)
    logs = torch.empty((parts, *y_log.shape), dtype=torch.float32, device=y.device)
    read(walk, q, k, v, None, walk.beside, first, last, out, logs)
    rows = y_log.numel()
    combine_kernel[(cdiv(rows, ROWS),)](out, logs, y, y_log, rows, parts, P=WIDTH, ROWS=ROWS, BLOCK_P=WIDTH)


def read(
    walk: LeanWalk, reader: Tensor, writer: Tensor, payload: Tensor, reader_beside: Tensor | None,
    writer_beside: Tensor, first: Tensor | None, last: Tensor, out: Tensor, logs: Tensor | None,
) -> None:  # fmt: skip
    """Outputs of every part of the features, [parts,B,T,H,P], or gradients of v if there are no `logs`: in reverse."""
    programs, width = walk.grid("lean_read")
    lean_read_kernel[(programs,)](
        reader, writer, payload, walk.weights, reader_beside, writer_beside, first, last, walk.starts, walk.ends,
        out, logs, reader.shape[0] * reader.shape[1], walk.starts.shape[0], width,
        reader.stride(2), writer.stride(2), payload.stride(2),
        J_READER=walk.heads // reader.shape[2], J_WRITER=walk.heads // writer.shape[2],
        J_PAYLOAD=walk.heads // payload.shape[2],
        REVERSE=logs is None, HAS_FIRST=first is not None, EMPTY_LOG=float("-inf"),
        **walk.constants("lean_read", reader=reader, writer=writer, payload=payload),
    )  # fmt: skip


def lean_backward(
    walk: LeanWalk, dy: Tensor, y: Tensor, dlog: Tensor, log_total: Tensor, q: Tensor, k: Tensor, v: Tensor,
    initial: Tensor | None, first: Tensor, last: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, and for every query head of k and v: [B,T,H,.]. first: the cotangent of the final state.

    The gradient of the state before the first token goes to `last`, as the sums over queries.
    """
    delta = torch.empty_like(log_total)
    beside = beside_queries(dy, y, dlog, log_total, delta)
    dq = gradient(walk, q, k, dy, v, beside, walk.beside, delta, initial, last, reverse=False)
    dk = gradient(walk, k, q, v, dy, walk.beside, beside, None, first, last, reverse=True)
    parts = torch.empty((walk.parts("lean_read"), *dy.shape), dtype=dy.dtype, device=dy.device)
    read(walk, k, q, dy, walk.beside, beside, first, last, parts, None)
    return dq, dk, gathered(parts, None, k)


def beside_queries(dy: Tensor, y: Tensor, dlog: Tensor, log_total: Tensor, delta: Tensor) -> Tensor:
    """What stands beside the queries in the gradients, [B,T,H,LANES]; <dy, y> - dlog goes to `delta` [B,T,H]."""
    beside = torch.empty((*log_total.shape, LANES.value), dtype=torch.bfloat16, device=dy.device)
    rows = log_total.numel()
    beside_queries_kernel[(cdiv(rows, ROWS),)](
        dy, y, dlog, log_total, delta, beside, rows, P=WIDTH, ROWS=ROWS
    )  # fmt: skip
    return beside


def gradient(
    walk: LeanWalk, reader: Tensor, writer: Tensor, beside: Tensor, payload: Tensor, reader_beside: Tensor,
    writer_beside: Tensor, delta: Tensor | None, first: Tensor | None, last: Tensor, *, reverse: bool,
) -> Tensor:  # fmt: skip
    """Gradient of the reader for every query head, [B,T,H,N]; in reverse the last state is stored."""
    shape = (walk.parts("lean_gradient"), *reader.shape[:2], walk.heads, WIDTH)
    parts = torch.empty(shape, dtype=reader.dtype, device=reader.device)
    felt = torch.empty(shape[:4], dtype=torch.float32, device=reader.device) if reverse else None
    programs, width = walk.grid("lean_gradient")
    lean_gradient_kernel[(programs,)](
        reader, writer, beside, payload, walk.weights, walk.rows, reader_beside, writer_beside, delta, first, last,
        walk.starts, walk.ends, parts, felt, reader.shape[0] * reader.shape[1], walk.starts.shape[0], width,
        reader.stride(2), writer.stride(2), beside.stride(2), payload.stride(2),
        J_READER=walk.heads // reader.shape[2], J_WRITER=walk.heads // writer.shape[2],
        REVERSE=reverse, HAS_FIRST=first is not None,
        **walk.constants("lean_gradient", reader=reader, writer=writer, beside=beside, payload=payload),
    )  # fmt: skip
    return gathered(parts, felt, reader)


def gathered(parts: Tensor, felt: Tensor | None, x: Tensor) -> Tensor:
    """The sum over parts [parts,B,T,H,N], rounded once; `felt`: with what |x'|^2 / 2 gives."""
    out = torch.empty(parts.shape[1:], dtype=parts.dtype, device=parts.device)
    rows, heads = out.numel() // WIDTH, out.shape[2]
    gather_kernel[(cdiv(rows, ROWS),)](
        parts, felt, x, out, rows, parts.shape[0], WIDTH**-0.5, x.stride(1), x.stride(2),
        H=heads, J=heads // x.shape[2], N=WIDTH, ROWS=ROWS, HAS_FELT=felt is not None,
    )  # fmt: skip
    return out

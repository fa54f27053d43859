"""Launches the kernels that read states at the borders of chunks, in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.ops.favor_attention.kernels.border_gradient import border_gradient_kernel
from zoo.ops.favor_attention.kernels.border_read import border_read_kernel
from zoo.ops.favor_attention.kernels.border_sweep import border_sweep_kernel
from zoo.ops.favor_attention.kernels.rows import combine_kernel
from zoo.ops.favor_attention.kernels.walk_launch import ROWS, Walk, added
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.semiseparable.kernels.launch import strides


@dataclass(frozen=True)
class Slots:
    """Chunks of all sequences: slots [S], the first of each sequence; owner, local [slots], the sequence and the place
    in it of each; one past its sequence's end has nothing to do. All int64."""

    slots: Tensor
    owner: Tensor
    local: Tensor


@dataclass(frozen=True)
class Borders:
    """sums: [slots,H,M,P] in bfloat16. scales: [slots,H,2,M], sums of payload scalars and scales, float32."""

    sums: Tensor
    scales: Tensor


def slots_of(walk: Walk, tokens: int, *, packed: bool) -> Slots:
    """tokens: of a sequence, or of all if packed."""
    chunk = int(walk.table["border"]["chunk"])
    starts, each = walk.starts, cdiv(tokens, chunk)
    sequence = torch.arange(starts.shape[0], device=starts.device)
    if packed:
        first = starts // chunk + sequence
        slot = torch.arange(tokens // chunk + starts.shape[0], device=starts.device)
        owner = torch.searchsorted(first, slot, right=True) - 1
        return Slots(first, owner, slot - first[owner])
    local = torch.arange(each, device=starts.device)
    return Slots(sequence * each, sequence.repeat_interleave(each), local.repeat(starts.shape[0]))


def blocks(walk: Walk, kernel: str) -> dict[str, Any]:
    """Constants of one kernel.

    Two warp groups share the features of the sweep: 64 of them would be split into tiles of 32 columns instead, which
    are miscompiled elsewhere.
    """
    border = walk.table["border"]
    chosen: dict[str, Any] = walk.constants | border[kernel] | {"CHUNK": border["chunk"]}
    chosen["BLOCK_M"] = min(chosen["BLOCK_M"], next_power_of_2(walk.constants["M"]))
    if kernel == "sweep" and chosen["BLOCK_M"] < 128:
        chosen["num_warps"] = 4
    return chosen


def sweep(
    walk: Walk, slots: Slots, writer: Tensor, payload: Tensor, log_total: Tensor | None, delta: Tensor | None,
    first: Tensor | None, last: Tensor,
) -> Borders:  # fmt: skip
    """States at all borders, and the last one into `last`; of the queries if log_total is given: in reverse."""
    count, channels = walk.constants["M"], walk.constants["P"]
    shape = (slots.owner.numel(), walk.heads)
    sums = torch.empty((*shape, count, channels), dtype=torch.bfloat16, device=writer.device)
    scales = torch.empty((*shape, 2, count), dtype=torch.float32, device=writer.device)
    chosen = blocks(walk, "sweep")
    border_sweep_kernel[(walk.starts.shape[0] * walk.heads, cdiv(count, chosen["BLOCK_M"]))](
        writer, payload, walk.hi, walk.lo, walk.half, log_total, delta, first, last,
        walk.starts, walk.ends, slots.slots, sums, scales, walk.feature_eps, *strides(writer, payload),
        J_WRITER=walk.heads // writer.shape[2], REVERSE=log_total is not None, HAS_FIRST=first is not None, **chosen,
    )  # fmt: skip
    return Borders(sums, scales)


def read_borders(
    walk: Walk, slots: Slots, borders: Borders, reader: Tensor, writer: Tensor, payload: Tensor,
    log_total: Tensor | None, y: Tensor | None, y_log: Tensor | None,
) -> Tensor:  # fmt: skip
    """Outputs (into y and y_log), or the gradients of v for every query head [B,T,H,P] if `y` is None: in reverse."""
    chosen = blocks(walk, "read")
    slices = cdiv(walk.constants["M"], chosen["BLOCK_M"])
    batch, tokens = reader.shape[:2]
    shape = (slices, batch, tokens, walk.heads, payload.shape[3])
    one = slices == 1
    out = y if y is not None and one else torch.empty(shape, dtype=payload.dtype, device=reader.device)
    logs = y_log if y_log is not None and one else torch.empty(shape[:4], dtype=torch.float32, device=reader.device)
    border_read_kernel[(slots.owner.numel() * walk.heads, slices)](
        reader, writer, payload, walk.hi, walk.lo, walk.half, log_total, borders.sums, borders.scales,
        walk.starts, walk.ends, slots.owner, slots.local, out, logs,
        batch * tokens, walk.feature_eps, *strides(reader, writer, payload),
        J_READER=walk.heads // reader.shape[2], J_WRITER=walk.heads // writer.shape[2],
        J_PAYLOAD=walk.heads // payload.shape[2],
        REVERSE=y is None, EMPTY_LOG=float("inf") if one else float("-inf"), **chosen,
    )  # fmt: skip
    if y is None:
        return added(out)
    if not one:
        rows = y.numel() // y.shape[3]
        combine_kernel[(cdiv(rows, ROWS),)](
            out, logs, y, y_log, rows, slices, P=y.shape[3], ROWS=ROWS, BLOCK_P=walk.constants["BLOCK_P"]
        )
    return y


def gradient_borders(
    walk: Walk, slots: Slots, borders: Borders, reader: Tensor, writer: Tensor, beside: Tensor, payload: Tensor,
    log_total: Tensor, delta: Tensor, *, reverse: bool,
) -> Tensor:  # fmt: skip
    """Gradient of the reader for every query head, [B,T,H,N]."""
    chosen = blocks(walk, "gradient")
    batch, tokens, _, width = reader.shape
    slices = cdiv(walk.constants["M"], chosen["BLOCK_M"])
    grad = torch.empty((slices, batch, tokens, walk.heads, width), dtype=reader.dtype, device=reader.device)
    border_gradient_kernel[(slots.owner.numel() * walk.heads, slices)](
        reader, writer, beside, payload, walk.hi, walk.lo, walk.rows, walk.half, log_total, delta,
        borders.sums, borders.scales, walk.starts, walk.ends, slots.owner, slots.local,
        grad, batch * tokens, walk.half_scale, walk.feature_eps, *strides(reader, writer, beside, payload),
        J_READER=walk.heads // reader.shape[2], J_WRITER=walk.heads // writer.shape[2], REVERSE=reverse, **chosen,
    )  # fmt: skip
    return added(grad)

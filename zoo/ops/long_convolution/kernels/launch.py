"""Launches the Toeplitz kernels with block sizes that follow from the dtype; nothing is searched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.rows import cdiv
from zoo.ops.long_convolution.crossover import GRADIENT_LONGEST
from zoo.ops.long_convolution.kernels import dense_launch, spectra
from zoo.ops.long_convolution.kernels.toeplitz import tap_gradient_kernel, toeplitz_kernel
from zoo.ops.semiseparable.kernels.launch import OPERANDS


def blocks(u_t: Tensor) -> dict[str, Any]:
    """IEEE float32 products hold their operands in registers: smaller tiles."""
    size = 32 if u_t.dtype == torch.float32 else 64
    return {"D": u_t.shape[0], "CHUNK": size, "ROWS": size, "num_warps": 8, "num_stages": 2}


def chunk_rows(u_t: Tensor, cu_seqlens: Tensor | None, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """First token of every row of `chunk` tokens, and begin and end of its sequence: int64 [rows].

    u_t: [D,B,T]. Shapes follow from sizes alone; slots of a packed row without a token end where they begin.
    """
    _, batch, tokens = u_t.shape
    if cu_seqlens is None:
        begin = torch.arange(batch, device=u_t.device) * tokens
        step = torch.arange(0, tokens, chunk, device=u_t.device)
        start = (begin[:, None] + step).flatten()
        begin = begin.repeat_interleave(step.numel(), output_size=start.numel())
        return start, begin, begin + tokens
    bounds = cu_seqlens.long()
    first = bounds[:-1] // chunk + torch.arange(bounds.numel() - 1, device=u_t.device)
    slot = torch.arange(tokens // chunk + bounds.numel() - 1, device=u_t.device)
    owner = torch.searchsorted(first, slot, right=True) - 1
    begin, end = bounds[owner], bounds[owner + 1]
    start = begin + (slot - first[owner]) * chunk
    return torch.minimum(start, end), begin, end


def toeplitz(u_t: Tensor, taps: Tensor, ahead: int, cu_seqlens: Tensor | None, *, mirror: bool) -> Tensor:
    """y_i = sum_w taps_w u_{i - w + ahead} for u_t [D,B,T], taps [D,W] float32; or, mirrored, the gradient of u."""
    if dense_launch.serves(u_t, taps.shape[1], cu_seqlens):
        return dense_launch.toeplitz(u_t, taps, ahead, mirror=mirror)
    options = blocks(u_t)
    rows = chunk_rows(u_t, cu_seqlens, options["CHUNK"])
    count = rows[0].numel()
    y_t = torch.empty(u_t.shape, dtype=u_t.dtype, device=u_t.device)
    with on_device(u_t):
        toeplitz_kernel[(cdiv(count, options["ROWS"]) * options["D"],)](
            u_t, taps, y_t, *rows, count, taps.shape[1], ahead, u_t.shape[1] * u_t.shape[2],
            MIRROR=mirror, OPERAND=OPERANDS[u_t.dtype], **options,
        )  # fmt: skip
    return y_t


def tap_gradient(u_t: Tensor, dy_t: Tensor, taps: int, ahead: int, cu_seqlens: Tensor | None) -> Tensor:
    """Gradient of the W = `taps` taps, [D,W] float32."""
    if cu_seqlens is None and taps > GRADIENT_LONGEST[u_t.dtype]:
        return spectra.tap_gradient(u_t, dy_t, taps, ahead)
    if dense_launch.serves(u_t, taps, cu_seqlens):
        return dense_launch.tap_gradient(u_t, dy_t, taps, ahead)
    options = blocks(u_t)
    chunk, channels = options["CHUNK"], options["D"]
    rows = chunk_rows(u_t, cu_seqlens, chunk)
    first = -cdiv(ahead, chunk)
    apart = cdiv(taps - 1 - ahead, chunk) - first + 1
    sums = torch.empty((apart, 2, channels, chunk), dtype=torch.float32, device=u_t.device)
    with on_device(u_t):
        tap_gradient_kernel[(apart * channels,)](
            u_t, dy_t, *rows, sums, rows[0].numel(), first, u_t.shape[1] * u_t.shape[2], **options
        )
    by_lag = torch.zeros((apart + 1, channels, chunk), dtype=torch.float32, device=u_t.device)  # from (first-1) chunk
    by_lag[1:] += sums[:, 0]
    by_lag[:-1] += sums[:, 1]
    begin = -ahead - (first - 1) * chunk
    return by_lag.transpose(0, 1).flatten(1)[:, begin : begin + taps].contiguous()

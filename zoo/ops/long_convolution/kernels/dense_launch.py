"""Launches the kernels of unpacked rows in bfloat16 with block sizes from a table; nothing is searched."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.rows import cdiv
from zoo.ops.long_convolution.kernels.dense import copies_kernel, dense_kernel
from zoo.ops.long_convolution.kernels.dense_gradient import dense_gradient_kernel, join_kernel

MOST = 2**31 - 2**20  # tokens of a batch, and vectors of taps, that 32-bit offsets within a channel reach


class Blocks(NamedTuple):
    """Sizes of `dense_kernel`: tokens and rows of an output tile, tokens of a product, taps and tokens of a vector."""

    chunk: int
    step: int
    rows: int
    copies: int
    vector: int
    warps: int
    stages: int


class PairBlocks(NamedTuple):
    """Sizes of `dense_gradient_kernel`: tokens of dy and of u in a row, tokens of a vector of u, rows of a product.

    registers: the most of a thread, so that two programs fit a multiprocessor, or None.
    """

    chunk: int
    width: int
    vector: int
    rows: int
    warps: int
    stages: int
    registers: int | None


TABLE = {  # most tokens a channel has in a batch: blocks
    8192: Blocks(64, 64, 128, 8, 8, 8, 3),
    MOST: Blocks(128, 64, 128, 4, 8, 8, 3),
}
PAIR_TABLE = {MOST: PairBlocks(64, 256, 8, 64, 8, 2, 128)}


def serves(u_t: Tensor, taps: int, cu_seqlens: Tensor | None) -> bool:
    """Whether these kernels take the call."""
    _, batch, tokens = u_t.shape
    fits = batch * tokens < MOST and 8 * (taps + 1024) < MOST
    return u_t.dtype == torch.bfloat16 and cu_seqlens is None and fits


def toeplitz(u_t: Tensor, taps: Tensor, ahead: int, *, mirror: bool, blocks: Blocks | None = None) -> Tensor:
    """y_i = sum_w taps_w u_{i - w + ahead} for u_t [D,B,T] bfloat16, taps [D,W]; or, mirrored, the gradient of u."""
    D, B, T = u_t.shape
    W = taps.shape[1]
    blocks = blocks or next(row for most, row in TABLE.items() if most >= B * T)
    chunk, step, rows, copies, vector, warps, stages = blocks
    if mirror:
        ahead = W - 1 - ahead
    first = -((chunk - 1 + ahead) // step)
    last = (W - 1 - ahead + step - 1) // step
    first, last = max(first, -((T - 1) // step)), min(last, (T + step - 1) // step)
    length = cdiv((last - first) * step + chunk + step - copies, 64) * 64
    repeated = torch.empty((D, copies, length), dtype=torch.bfloat16, device=u_t.device)
    y_t = torch.empty_like(u_t)
    count = B * cdiv(T, chunk)
    with on_device(u_t):
        copies_kernel[(D * cdiv(length, 512),)](
            taps, repeated, W, length, first * step - (step - copies) + ahead,
            MIRROR=mirror, COPIES=copies, BLOCK=512, num_warps=4,
        )  # fmt: skip
        dense_kernel[(D * cdiv(count, rows),)](
            u_t, repeated, y_t, T, B, count, length, first, last, 0,
            COPIES=copies, VECTOR=vector, CHUNK=chunk, STEP=step, ROWS=rows, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y_t


def tap_gradient(u_t: Tensor, dy_t: Tensor, taps: int, ahead: int, blocks: PairBlocks | None = None) -> Tensor:
    """Gradient of the W = `taps` taps, [D,W] float32."""
    D, B, T = u_t.shape
    blocks = blocks or next(row for most, row in PAIR_TABLE.items() if most >= B * T)
    chunk, width, vector, rows, warps, stages, registers = blocks
    chunks = cdiv(T, chunk)
    first = max(-cdiv(ahead, chunk), 1 - chunks)
    apart = min(cdiv(taps - 1 - ahead, chunk), chunks - 1) - first + 1
    lags = cdiv(apart * chunk, width) * width
    sums = torch.empty((chunk // 32, 2, D, lags), dtype=torch.float32, device=u_t.device)
    out = torch.empty((D, taps), dtype=torch.float32, device=u_t.device)
    with on_device(u_t):
        dense_gradient_kernel[(D * (lags // width),)](
            u_t, dy_t, sums, T, B, D, first, 0,
            CHUNK=chunk, WIDTH=width, VECTOR=vector, ROWS=rows, TOGETHER=min(8, triton.next_power_of_2(B)),
            num_warps=warps, num_stages=stages, maxnreg=registers,
        )  # fmt: skip
        join_kernel[(D * cdiv(taps, 512),)](
            sums, out, taps, lags, D, chunk - 32 - ahead - first * chunk, CHUNK=chunk, BLOCK=512, num_warps=4
        )
    return out

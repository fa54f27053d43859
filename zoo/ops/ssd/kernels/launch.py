"""SSD from states at the borders of its chunks: forward and backward, in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.semiseparable.kernels.chunks import chunks_of, decay_sums
from zoo.ops.semiseparable.kernels.launch import on_device
from zoo.ops.ssd.kernels.decays import decays
from zoo.ops.ssd.kernels.keys import keys
from zoo.ops.ssd.kernels.pairs import pairs
from zoo.ops.ssd.kernels.rows import outputs, values
from zoo.ops.ssd.kernels.sweep import sweep

CHUNK = 128
SWEEP = {"BLOCK_N": 128, "BLOCK_P": 64, "num_warps": 4, "num_stages": 2}
OUTPUTS = {"BLOCK_Q": 128, "HEADS": 16, "num_warps": 8, "num_stages": 3}
VALUES = {"BLOCK_Q": 128, "HEADS": 16, "num_warps": 8, "num_stages": 3}
PAIRS = {"HEADS": 16, "num_warps": 8, "num_stages": 3}
KEYS = {"HEADS": 64, "num_warps": 8, "num_stages": 3}

WIDTHS, LARGEST = (16, 32, 64, 128), 128 * 64  # N and P, and N P: what fits in shared memory and passed on a GPU


def serves(x: Tensor, B: Tensor) -> bool:
    """Whether these kernels take x [B,T,H,P] and B [B,T,G,N]."""
    channels, modes = x.shape[3], B.shape[3]
    return x.dtype == torch.bfloat16 and channels in WIDTHS and modes in WIDTHS and channels * modes <= LARGEST


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    has_softplus: bool, limits: tuple[float, float], start: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B,T,H,P] and the final state [S,H,P,N], float32. A, D, dt_bias: float32 [H]; start: float32 [S,H,P,N]."""
    chunks = chunks_of(x, cu_seqlens, CHUNK)
    with on_device(x):
        s, r = decay_sums(chunks, dt, A, dt_bias, has_softplus, limits)
        S, _, final, _ = sweep(chunks, x, None, B, C, s, r, start, None, SWEEP)
        return outputs(chunks, x, B, C, s, r, S, D, OUTPUTS), final


def backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, has_softplus: bool, limits: tuple[float, float], start: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, dt_bias and start, contiguous; those of A, D, dt_bias and start in float32.

    Everything is computed anew from the inputs: the states that enter the chunks and the gradients of those that leave
    them are written once, in the dtype of x, and read by `values` and `keys`.
    """
    chunks = chunks_of(x, cu_seqlens, CHUNK)
    with on_device(x):
        s, r = decay_sums(chunks, dt, A, dt_bias, has_softplus, limits)
        S, R, _, dstart = sweep(chunks, x, dy, B, C, s, r, start, dfinal, SWEEP)
        K, row, col, skip = pairs(chunks, x, dy, B, C, s, r, D is not None, PAIRS)
        dB, dC, read, kept, flow = keys(chunks, x, dy, B, C, s, r, S, R, K, KEYS)
        del S, K  # before dx takes as much
        dx = values(chunks, dy, B, C, s, r, R, D, VALUES)
        del R
        ddt, dA, dbias, dD = decays(
            chunks, dt, A, dt_bias, has_softplus, limits, row, col, kept, read, None if D is None else skip, flow
        )
    return dx, ddt, dA, dB, dC, dD, dbias, dstart

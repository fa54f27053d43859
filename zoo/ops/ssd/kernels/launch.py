"""SSD backward from states at the borders of its chunks, in bfloat16."""

from __future__ import annotations

from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.semiseparable.kernels.chunks import chunks_of, decay_sums
from zoo.ops.ssd.kernels.decays import decays
from zoo.ops.ssd.kernels.keys import keys
from zoo.ops.ssd.kernels.pairs import pairs
from zoo.ops.ssd.kernels.sweep import sweep
from zoo.ops.ssd.kernels.values import values
from zoo.ops.ssd.widths import N_MOST

CHUNK = 128
# States: whole ones where there are programs enough, else rows of them; the last where nothing is enough.
SWEEP = (
    {"BLOCK_N": 128, "BLOCK_P": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_N": 64, "BLOCK_P": 64, "num_warps": 4, "num_stages": 3},
)
FEWEST_SWEEPS = 200  # programs of a launch: less than two for each multiprocessor leaves memory idle
VALUES = {"BLOCK_Q": 128, "HEADS": 64, "num_warps": 8, "num_stages": 3}
WIDE = {"BLOCK_Q": 128, "HEADS": 64, "num_warps": 8, "num_stages": 2}  # values of more than 128 modes
PAIRS = {"BLOCK_I": 64, "BLOCK_J": 64, "HEADS": 64, "num_warps": 4, "num_stages": 3}
KEYS = {"BLOCK_N": 128, "HEADS": 64, "num_warps": 8, "num_stages": 3}


def sweep_blocks(programs: int) -> dict[str, int]:
    """Settings of a sweep. programs: those that would own whole states."""
    for options in SWEEP:
        if programs * (SWEEP[0]["BLOCK_N"] // options["BLOCK_N"]) >= FEWEST_SWEEPS:
            return options
    return SWEEP[-1]


def backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, has_softplus: bool, limits: tuple[float, float], start: Tensor | None,
    cu_seqlens: Tensor | None, dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, dt_bias, start, contiguous; those of A, D, dt_bias and start in float32.

    A, D, dt_bias: float32 [H]; start: float32 [S,H,P,N]. N and P: 16, 32, 64 or 128, and N P at most 128 64; or N 256
    and P at most 64. For others see `wide`.
    dx: where the gradient of x goes, [B,T,H,P] with one stride from token to token; None for a tensor of its own.

    Everything is computed anew from the inputs: the states that enter the chunks and the gradients of those that leave
    them are written once, in the dtype of x, and read by `values` and `keys`.
    """
    chunks = chunks_of(x, cu_seqlens, CHUNK)
    with on_device(x):
        s, r = decay_sums(chunks, dt, A, dt_bias, has_softplus, limits, finite=True)
        blocks = sweep_blocks(2 * chunks.sequences * x.shape[2])
        S, R, dstart = sweep(chunks, x, dy, B, C, s, r, start, dfinal, blocks)
        K, row, col, skip = pairs(chunks, x, dy, B, C, s, r, D is not None, PAIRS)
        dB, dC, read, kept, flow = keys(chunks, x, dy, B, C, s, r, S, R, K, KEYS)
        del S, K  # before dx takes as much
        dx = values(chunks, dy, B, C, s, r, R, D, WIDE if B.shape[3] > N_MOST else VALUES, dx)
        del R
        ddt, dA, dbias, dD = decays(
            chunks, dt, A, dt_bias, has_softplus, limits, row, col, kept, read, None if D is None else skip, flow
        )
    return dx, ddt, dA, dB, dC, dD, dbias, dstart

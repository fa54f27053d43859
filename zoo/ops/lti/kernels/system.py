"""What a step of a diagonal system needs, from its parameters in one kernel: a layer's float64 arithmetic of a few
thousand numbers would otherwise be dozens of launches, each longer than the step of a small batch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.rows import cdiv

BLOCK = 256  # modes of a program
FLOOR = 1e-4  # added under "relu"
NEAR = 1e-3  # |z| below which (e^z - 1) / z is summed as a series: five terms leave z^5 / 720


@triton.jit
def positive(x, KIND: tl.constexpr, FLOOR: tl.constexpr):
    """The number that a parameter stands for, float64."""
    if KIND == "exp":
        x = tl.exp(x)
    elif KIND == "softplus":
        x = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
    elif KIND == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    elif KIND == "relu":
        x = tl.maximum(x, 0.0) + FLOOR
    return x


@launched
def system_kernel(
    dt_ptr, rate_ptr, turn_ptr, B_ptr, C_ptr,  # [D,1] or [D,M], [S,M], [S,M], [S,M,2], [D,M,2]
    less_ptr, weight_ptr,  # -> [D,M,2] [D,M,2], float32
    modes, S,
    M: tl.constexpr, DT: tl.constexpr, RATE: tl.constexpr, TURN: tl.constexpr, SIGN: tl.constexpr, ZOH: tl.constexpr,
    TIED: tl.constexpr, HAS_TURN: tl.constexpr, HAS_B: tl.constexpr, HIGHEST: tl.constexpr,  # 0: no limit
    FLOOR: tl.constexpr, NEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK modes: A' - 1 and 2 C B' of each."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < modes
    channel = at // M
    shared = (channel % S) * M + at % M
    dt = tl.load(dt_ptr + (channel if TIED else at), mask=live, other=0.0).to(tl.float64)
    rate = tl.load(rate_ptr + shared, mask=live, other=0.0).to(tl.float64)
    dt = positive(dt, DT, FLOOR)
    x = -positive(rate, RATE, FLOOR) * dt
    y = x * 0.0
    if HAS_TURN:
        turn = tl.load(turn_ptr + shared, mask=live, other=0.0).to(tl.float64)
        y = SIGN * positive(turn, TURN, FLOOR) * dt
    size = x * x + y * y
    if ZOH:  # B' / B = dt g with g = (e^z - 1) / z, and A' - 1 = z g
        scale = tl.exp(x)
        grown_re = scale * tl.cos(y) - 1.0
        grown_im = scale * tl.sin(y)
        inverse = 1.0 / tl.where(size == 0.0, 1.0, size)
        g_re = (grown_re * x + grown_im * y) * inverse
        g_im = (grown_im * x - grown_re * y) * inverse
        p_re = 1.0 + x * 0.2
        p_im = y * 0.2
        for k in tl.static_range(4, 1, -1):  # 1 + z/2 (1 + z/3 (1 + z/4 (1 + z/5)))
            step_re = 1.0 + (x * p_re - y * p_im) / k
            p_im = (x * p_im + y * p_re) / k
            p_re = step_re
        near = size < NEAR * NEAR
        g_re = tl.where(near, p_re, g_re)
        g_im = tl.where(near, p_im, g_im)
    else:  # B' / B = dt g with g = 1 / (1 - z/2), and A' - 1 = z g
        below = 1.0 - 0.5 * x
        inverse = 1.0 / (below * below + 0.25 * y * y)
        g_re = below * inverse
        g_im = 0.5 * y * inverse
    pair = less_ptr + at * 2
    tl.store(pair, (x * g_re - y * g_im).to(tl.float32), mask=live)
    tl.store(pair + 1, (x * g_im + y * g_re).to(tl.float32), mask=live)

    w_re = tl.load(C_ptr + at * 2, mask=live, other=0.0).to(tl.float64)
    w_im = tl.load(C_ptr + at * 2 + 1, mask=live, other=0.0).to(tl.float64)
    if HIGHEST > 0:
        heard = tl.abs(y) < HIGHEST
        w_re = tl.where(heard, w_re, 0.0)
        w_im = tl.where(heard, w_im, 0.0)
    if HAS_B:
        b_re = tl.load(B_ptr + shared * 2, mask=live, other=0.0).to(tl.float64)
        b_im = tl.load(B_ptr + shared * 2 + 1, mask=live, other=0.0).to(tl.float64)
        turned = w_re * b_re - w_im * b_im
        w_im = w_re * b_im + w_im * b_re
        w_re = turned
    pair = weight_ptr + at * 2
    tl.store(pair, (2.0 * dt * (w_re * g_re - w_im * g_im)).to(tl.float32), mask=live)
    tl.store(pair + 1, (2.0 * dt * (w_re * g_im + w_im * g_re)).to(tl.float32), mask=live)


def launch(
    dt: Tensor,
    rate: Tensor,
    turn: Tensor | None,
    B: Tensor | None,
    C: Tensor,
    dt_transform: str,
    rate_transform: str,
    turn_transform: str,
    turn_sign: int,
    disc: str,
    bandlimit: float | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as those of the custom operator."""
    less, weight = (torch.empty(C.shape, dtype=torch.float32, device=C.device) for _ in range(2))
    channels, modes = C.shape[:2]
    raw = rate.contiguous()
    with on_device(C):
        system_kernel[(cdiv(channels * modes, BLOCK),)](
            dt.contiguous(), raw, raw if turn is None else turn.contiguous(), raw if B is None else B.contiguous(),
            C.contiguous(), less, weight, channels * modes, rate.shape[0],
            M=modes, DT=dt_transform, RATE=rate_transform, TURN=turn_transform, SIGN=turn_sign, ZOH=disc == "zoh",
            TIED=dt.numel() == channels, HAS_TURN=turn is not None, HAS_B=B is not None,
            HIGHEST=math.pi * (bandlimit or 0.0), FLOOR=FLOOR, NEAR=NEAR, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return less, weight

"""One token of SSD in place: the state is read once and written once, everything else stays in registers."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import exp
from zoo.ops.kernels.rows import cdiv, next_power_of_2, rows, warps_for
from zoo.ops.kernels.time_step import softplus

TILE = 4096  # elements of the state that one program holds, 32 in each of 128 threads


@launched
def ssd_step_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr,  # [B,H,P] [B,H] [H] [B,G,N] [B,G,N]
    D_ptr, dt_bias_ptr, state_ptr, y_ptr,  # [H] or [H,P], [H], [B,H,P,N], [B,H,P]
    H, heads_of_group, P, low, high,
    x_stride_b, x_stride_h, dt_stride_b, b_stride_b, b_stride_g, c_stride_b, c_stride_g,
    state_stride_b, state_stride_h, state_stride_p,
    N: tl.constexpr, HAS_D: tl.constexpr, D_PER_CHANNEL: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns a tile [BLOCK_P, N] of the state of one head of one sequence."""
    blocks = tl.cdiv(P, BLOCK_P)
    head = tl.program_id(0) // blocks
    p = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    group = h // heads_of_group
    in_p = p < P
    in_n = n < N
    in_tile = in_p[:, None] & in_n[None, :]

    tile = state_ptr + b * state_stride_b + h * state_stride_h + p.to(tl.int64)[:, None] * state_stride_p + n[None, :]
    state = tl.load(tile, mask=in_tile, other=0.0)  # [BLOCK_P, BLOCK_N]
    keys = tl.load(B_ptr + b * b_stride_b + group * b_stride_g + n, mask=in_n, other=0.0).to(tl.float32)
    queries = tl.load(C_ptr + b * c_stride_b + group * c_stride_g + n, mask=in_n, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * x_stride_b + h * x_stride_h + p, mask=in_p, other=0.0).to(tl.float32)
    step = tl.load(dt_ptr + b * dt_stride_b + h).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(dt_bias_ptr + h).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    step = tl.maximum(step, low, propagate_nan=tl.PropagateNan.ALL)
    step = tl.minimum(step, high, propagate_nan=tl.PropagateNan.ALL)
    decay = exp(step * tl.load(A_ptr + h).to(tl.float32))

    state = decay * state + (step * x)[:, None] * keys[None, :]
    tl.store(tile, state, mask=in_tile)
    y = tl.sum(state * queries[None, :], axis=1)
    if HAS_D:
        skip = D_ptr + (h * P + p if D_PER_CHANNEL else h + tl.zeros_like(p))
        y += tl.load(skip, mask=in_p, other=0.0).to(tl.float32) * x
    tl.store(y_ptr + (b * H + h) * P + p, y.to(y_ptr.dtype.element_ty), mask=in_p)


def launch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    dt_softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    """Arguments and result as those of the custom operator."""
    batch, heads, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x, dt, B, C = (rows(part) for part in (x, dt, B, C))
    own = rows(state)
    block_n: int = next_power_of_2(state.shape[3])
    block_p = min(next_power_of_2(channels), max(1, TILE // block_n))
    skip = A if D is None else D.contiguous()
    with on_device(x):
        ssd_step_kernel[(batch * heads * cdiv(channels, block_p),)](
            x, dt, A.contiguous(), B, C, skip, A if dt_bias is None else dt_bias.contiguous(), own, y,
            heads, heads // B.shape[1], channels, low, high,
            x.stride(0), x.stride(1), dt.stride(0), B.stride(0), B.stride(1), C.stride(0), C.stride(1),
            own.stride(0), own.stride(1), own.stride(2),
            N=state.shape[3], HAS_D=D is not None, D_PER_CHANNEL=skip.dim() == 2, HAS_BIAS=dt_bias is not None,
            SOFTPLUS=dt_softplus, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=warps_for(block_p * block_n),
        )  # fmt: skip
    if own is not state:
        state.copy_(own)
    return y

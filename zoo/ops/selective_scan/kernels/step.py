"""One token of the selective scan in place: the state is read once and written once.

A program walks over a few sequences of its channels, so that their rates are read once for all of them; the next state
is under way while one is worked on.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import LOG2E, exp
from zoo.ops.kernels.rows import cdiv, next_power_of_2, rows, warps_for
from zoo.ops.kernels.time_step import softplus

TILE = 2048  # elements of the state that one program holds at a time, 16 in each of 128 threads
SEQUENCES = 4  # of one program


@launched
def selective_scan_step_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr,  # [B,E] [B,E] [E,N] [B,G,N] [B,G,N]
    D_ptr, z_ptr, dt_bias_ptr, state_ptr, y_ptr,  # [E] [B,E] [E] [B,E,N] [B,E]
    batch, E, channels_of_group,
    x_stride_b, dt_stride_b, b_stride_b, b_stride_g, c_stride_b, c_stride_g, z_stride_b, state_stride_b, state_stride_e,
    N: tl.constexpr, ONE_GROUP: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns a tile [BLOCK_E, N] of the states of SEQUENCES sequences, one after the other."""
    blocks = tl.cdiv(E, BLOCK_E)
    first = (tl.program_id(0) // blocks).to(tl.int64) * SEQUENCES
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e = e < E
    in_n = n < N
    in_tile = in_e[:, None] & in_n[None, :]
    tile = state_ptr + e.to(tl.int64)[:, None] * state_stride_e + n[None, :]
    upcoming = tl.load(tile + first * state_stride_b, mask=in_tile, other=0.0)  # [BLOCK_E, BLOCK_N]
    rate = tl.load(A_ptr + e.to(tl.int64)[:, None] * N + n[None, :], mask=in_tile, other=0.0).to(tl.float32)
    of_group = (e // channels_of_group).to(tl.int64)
    for i in tl.static_range(SEQUENCES):
        b = first + i
        live = tl.where(b < batch, E, 0)  # channels of this sequence that are there
        here = e < live
        state = upcoming
        if i + 1 < SEQUENCES:
            ahead = e < tl.where(b + 1 < batch, E, 0)
            in_ahead = ahead[:, None] & in_n[None, :]
            upcoming = tl.load(tile + (b + 1) * state_stride_b, mask=in_ahead, other=0.0)
        x = tl.load(x_ptr + b * x_stride_b + e, mask=here, other=0.0).to(tl.float32)
        step = tl.load(dt_ptr + b * dt_stride_b + e, mask=here, other=0.0).to(tl.float32)
        if HAS_BIAS:
            step += tl.load(dt_bias_ptr + e, mask=in_e, other=0.0).to(tl.float32)
        if SOFTPLUS:
            step = softplus(step)
        if ONE_GROUP:
            in_row = n[None, :] < tl.where(b < batch, N, 0)
            keys_at = B_ptr + b * b_stride_b + n[None, :]  # [1, BLOCK_N]
            queries_at = C_ptr + b * c_stride_b + n[None, :]
        else:
            in_row = here[:, None] & in_n[None, :]
            keys_at = B_ptr + b * b_stride_b + of_group[:, None] * b_stride_g + n[None, :]  # [BLOCK_E, BLOCK_N]
            queries_at = C_ptr + b * c_stride_b + of_group[:, None] * c_stride_g + n[None, :]
        keys = tl.load(keys_at, mask=in_row, other=0.0).to(tl.float32)
        queries = tl.load(queries_at, mask=in_row, other=0.0).to(tl.float32)
        state = exp(step[:, None] * rate) * state + (step * x)[:, None] * keys
        tl.store(tile + b * state_stride_b, state, mask=here[:, None] & in_n[None, :])
        y = tl.sum(state * queries, axis=1)
        if HAS_D:
            y += tl.load(D_ptr + e, mask=in_e, other=0.0).to(tl.float32) * x
        if HAS_Z:
            z = tl.load(z_ptr + b * z_stride_b + e, mask=here, other=0.0).to(tl.float32)
            y = y * z / (1.0 + tl.exp2(-z * LOG2E))
        tl.store(y_ptr + b * E + e, y.to(y_ptr.dtype.element_ty), mask=here)


def launch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    dt_softplus: bool,
) -> Tensor:
    """Arguments and result as those of the custom operator."""
    batch, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x, dt, B, C = (rows(part) for part in (x, dt, B, C))
    gate = x if z is None else rows(z)
    own = rows(state)
    block_n: int = next_power_of_2(state.shape[2])
    block_e = min(next_power_of_2(channels), max(1, TILE // block_n))
    sequences = min(SEQUENCES, next_power_of_2(batch))
    with on_device(x):
        selective_scan_step_kernel[(cdiv(batch, sequences) * cdiv(channels, block_e),)](
            x, dt, A.contiguous(), B, C, A if D is None else D.contiguous(), gate,
            A if dt_bias is None else dt_bias.contiguous(), own, y,
            batch, channels, channels // B.shape[1],
            x.stride(0), dt.stride(0), B.stride(0), B.stride(1), C.stride(0), C.stride(1), gate.stride(0),
            own.stride(0), own.stride(1),
            N=state.shape[2], ONE_GROUP=B.shape[1] == 1, HAS_D=D is not None, HAS_Z=z is not None,
            HAS_BIAS=dt_bias is not None, SOFTPLUS=dt_softplus, SEQUENCES=sequences,
            BLOCK_E=block_e, BLOCK_N=block_n, num_warps=warps_for(block_e * block_n),
        )  # fmt: skip
    if own is not state:
        state.copy_(own)
    return y

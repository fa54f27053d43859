"""One token of linear attention in place: the state is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import LOG2E, exp
from zoo.ops.kernels.rows import next_power_of_2, rows, warps_for

TILE = 4096  # elements of the state that one program holds at a time, 32 in each of 128 threads


@triton.jit
def feature(x, MAP: tl.constexpr):
    """phi(x), float32."""
    if MAP == "elu_plus_one":
        x = tl.where(x > 0, x + 1.0, exp(tl.minimum(x, 0.0)))
    elif MAP == "relu":
        x = tl.maximum(x, 0.0)
    elif MAP == "silu":
        x = x / (1.0 + tl.exp2(-x * LOG2E))
    elif MAP == "squared_relu":
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return x


@launched
def linear_attention_step_kernel(
    q_ptr, k_ptr, v_ptr, decay_ptr, state_ptr, y_ptr,  # [B,H,N] [B,G,N] [B,G,P] [B,H] or [B,H,N], [B,H,N,P(+1)] [B,H,P]
    H, heads_of_group, N, eps, scale,
    q_stride_b, q_stride_h, k_stride_b, k_stride_g, v_stride_b, v_stride_g, state_stride_b, state_stride_h,
    state_stride_n,
    P: tl.constexpr, MAP: tl.constexpr, NORMALIZE: tl.constexpr, HAS_DECAY: tl.constexpr,
    CHANNEL_DECAY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program owns the state [N, P(+1)] of one head of one sequence, BLOCK_N rows at a time."""
    head = tl.program_id(0).to(tl.int64)
    b = head // H
    h = head % H
    group = h // heads_of_group
    p = tl.arange(0, BLOCK_P)
    in_p = p < P
    v = tl.load(v_ptr + b * v_stride_b + group * v_stride_g + p, mask=in_p, other=0.0).to(tl.float32)
    decay = 1.0
    if HAS_DECAY and not CHANNEL_DECAY:
        decay = exp(tl.load(decay_ptr + head).to(tl.float32))
    state = state_ptr + b * state_stride_b + h * state_stride_h
    total = tl.zeros([BLOCK_P], tl.float32)
    weight = 0.0
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        in_n = n < N
        in_tile = in_n[:, None] & in_p[None, :]
        row = state + n.to(tl.int64) * state_stride_n
        s = tl.load(row[:, None] + p[None, :], mask=in_tile, other=0.0)  # [BLOCK_N, BLOCK_P]
        q = tl.load(q_ptr + b * q_stride_b + h * q_stride_h + n, mask=in_n, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + b * k_stride_b + group * k_stride_g + n, mask=in_n, other=0.0).to(tl.float32)
        q = tl.where(in_n, feature(q, MAP), 0.0)
        k = tl.where(in_n, feature(k, MAP), 0.0)
        if CHANNEL_DECAY:
            keep = exp(tl.load(decay_ptr + head * N + n, mask=in_n, other=0.0).to(tl.float32))
        else:
            keep = tl.zeros([BLOCK_N], tl.float32) + decay
        sums = k
        if NORMALIZE:
            sums += keep * tl.load(row + P, mask=in_n, other=0.0)
            tl.debug_barrier()  # every warp holds the column: none may read it after another has written
            tl.store(row + P, sums, mask=in_n)
            weight += tl.sum(q * sums, axis=0)
        s = keep[:, None] * s + k[:, None] * v[None, :]
        tl.store(row[:, None] + p[None, :], s, mask=in_tile)
        total += tl.sum(q[:, None] * s, axis=0)
    y = total * scale
    if NORMALIZE:
        y = y / (weight * scale + eps)
    tl.store(y_ptr + head * P + p, y.to(y_ptr.dtype.element_ty), mask=in_p)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    feature_map: str,
    normalize: bool,
    eps: float,
    scale: float,
) -> Tensor:
    """Arguments and result as those of the custom operator."""
    batch, heads, keys = q.shape
    values = v.shape[2]
    y = torch.empty((batch, heads, values), dtype=v.dtype, device=v.device)
    if y.numel() == 0:
        return y
    q, k, v, own = (rows(part) for part in (q, k, v, state))
    block_p: int = next_power_of_2(values)
    block_n = min(next_power_of_2(keys), max(1, TILE // block_p))
    with on_device(v):
        linear_attention_step_kernel[(batch * heads,)](
            q, k, v, q if log_decay is None else log_decay.contiguous(), own, y,
            heads, heads // k.shape[1], keys, eps, scale,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            own.stride(0), own.stride(1), own.stride(2),
            P=values, MAP=feature_map, NORMALIZE=normalize, HAS_DECAY=log_decay is not None,
            CHANNEL_DECAY=log_decay is not None and log_decay.dim() == 3, BLOCK_N=block_n, BLOCK_P=block_p,
            num_warps=warps_for(block_n * block_p),
        )  # fmt: skip
    if own is not state:
        state.copy_(own)
    return y

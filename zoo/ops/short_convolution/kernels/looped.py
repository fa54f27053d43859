"""Short convolution of many taps, without activation: loops over taps instead of unrolling them.

Serves what `banded` does not: float32, widths beyond its tiles, and channels that do not fill sectors.

The taps of a channel meet shifted copies of one tile, which stay in the cache. Sums over tokens are kept per program
and added up afterwards, so that every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.short_convolution.kernels.forward import _final_state
from zoo.ops.short_convolution.kernels.inputs import input_tile, rows_contiguous, sequence_of_tokens, spans

BLOCK_T, BLOCK_D = 32, 64
STATE_BLOCK_D = 16  # channels of a program that holds all taps of each
SEGMENT = 512  # tokens of a program that sums over them


@launched
def _looped_fwd(
    x_ptr, taps_ptr, bias_ptr, state_ptr, y_ptr,  # [B,T,D] [W,D] [D] [S,D,W-1] -> [B,T,D]
    sequence_ptr, cu_ptr,  # [T] [S+1] if PACKED
    T, D, x_stride_b, x_stride_t,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_T tokens of BLOCK_D channels of one row."""
    blocks = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    s, start, end = spans(sequence_ptr, cu_ptr, t, row, T, PACKED)
    x_row = x_ptr + row * x_stride_b
    y = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    for k in range(W):
        x = input_tile(x_row, state_ptr, t + (k - (W - 1)), s, start, end, d, in_d, D, x_stride_t, W, HAS_STATE)
        y += x * tl.load(taps_ptr + k * D + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + (row * T + t[:, None]) * D + d[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(t < T)[:, None] & in_d[None, :])


@launched
def _looped_dx(
    dy_ptr, dfinal_ptr, taps_ptr, dx_ptr,  # [B,T,D] [S,D,W-1] [W,D] -> [B,T,D]
    sequence_ptr, cu_ptr,  # [T] [S+1] if PACKED
    T, D, dy_stride_b, dy_stride_t,
    W: tl.constexpr, HAS_FINAL: tl.constexpr, PACKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns the gradient of BLOCK_T tokens of BLOCK_D channels: later outputs, and the final state."""
    blocks = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    s, _, end = spans(sequence_ptr, cu_ptr, t, row, T, PACKED)
    dy_row = dy_ptr + row * dy_stride_b
    dx = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for j in range(W):
        seen = ((t + j) < end)[:, None] & in_d[None, :]
        g = tl.load(dy_row + (t + j)[:, None] * dy_stride_t + d[None, :], mask=seen, other=0.0).to(tl.float32)
        dx += g * tl.load(taps_ptr + (W - 1 - j) * D + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    if HAS_FINAL:
        c = t - (end - (W - 1))
        kept = (c >= 0) & (t < end)
        at = dfinal_ptr + (s[:, None] * D + d[None, :]) * (W - 1) + c[:, None]
        dx += tl.load(at, mask=kept[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    at = dx_ptr + (row * T + t[:, None]) * D + d[None, :]
    tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=(t < T)[:, None] & in_d[None, :])


@launched
def _looped_dweight(
    dy_ptr, x_ptr, state_ptr, partial_ptr,  # [B,T,D] [B,T,D] [S,D,W-1] -> [programs,W+1,D]: taps, bias
    sequence_ptr, cu_ptr,  # [T] [S+1] if PACKED
    T, D, dy_stride_b, dy_stride_t, x_stride_b, x_stride_t,
    W: tl.constexpr, HAS_STATE: tl.constexpr, PACKED: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program owns SEGMENT tokens of BLOCK_D channels of one row: their share of the sums, token by token."""
    blocks = tl.cdiv(T, SEGMENT)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * SEGMENT
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    tap = tl.arange(0, BLOCK_W)
    x_row, dy_row = x_ptr + row * x_stride_b, dy_ptr + row * dy_stride_b
    dweight = tl.zeros([BLOCK_W, BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    for offset in range(0, tl.minimum(T - first, SEGMENT).to(tl.int32)):
        t = first + offset + tap * 0
        s, start, end = spans(sequence_ptr, cu_ptr, t, row, T, PACKED)
        p = t + (tap - (W - 1))
        x = input_tile(x_row, state_ptr, p, s, start, end, d, in_d, D, x_stride_t, W, HAS_STATE)  # [BLOCK_W, BLOCK_D]
        g = tl.load(dy_row + (first + offset) * dy_stride_t + d, mask=in_d, other=0.0).to(tl.float32)
        dweight += x * g[None, :]
        dbias += g
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (W + 1) * D
    tl.store(partial + tap[:, None] * D + d[None, :], dweight, mask=(tap < W)[:, None] & in_d[None, :])
    tl.store(partial + W * D + d, dbias, mask=in_d)


@launched
def _looped_dstate(
    dy_ptr, dfinal_ptr, weight_ptr, dstate_ptr,  # [B,T,D] [S,D,W-1] [D,W] -> [S,D,W-1]
    cu_ptr,  # [S+1] if PACKED
    T, D, dy_stride_b, dy_stride_t,
    W: tl.constexpr, HAS_FINAL: tl.constexpr, PACKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_D channels of the state gradient of one sequence: its first W-1 tokens see the state."""
    s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_W).to(tl.int64)
    in_d = d < D
    row, start, end = s, s * 0, s * 0 + T
    if PACKED:
        row, start, end = s * 0, tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1)
    kept = in_d[:, None] & (c < W - 1)[None, :]
    at = (s * D + d)[:, None] * (W - 1)
    stays = c - (end - start)  # a sequence shorter than the state leaves its newer part in the final state
    late = kept & ((stays >= 0) & HAS_FINAL)[None, :]
    dstate = tl.load(dfinal_ptr + at + stays[None, :], mask=late, other=0.0).to(tl.float32)
    for i in range(0, tl.minimum(end - start, W - 1).to(tl.int32)):
        g = tl.load(dy_ptr + row * dy_stride_b + (start + i) * dy_stride_t + d, mask=in_d, other=0.0).to(tl.float32)
        seen = kept & (c >= i)[None, :]  # token i meets state column c with tap c - i
        dstate += g[:, None] * tl.load(weight_ptr + d[:, None] * W + (c - i)[None, :], mask=seen, other=0.0).to(
            tl.float32
        )
    tl.store(dstate_ptr + at + c[None, :], dstate.to(dstate_ptr.dtype.element_ty), mask=kept)


def final_state(x: Tensor, state: Tensor | None, width: int, cu_seqlens: Tensor | None) -> Tensor:
    """The last W-1 inputs of every sequence, [S,D,W-1]; x with stride 1 along D, state [S,D,W-1] contiguous."""
    batch, tokens, channels = x.shape
    ends = x if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    final = torch.empty((sequences, channels, width - 1), dtype=x.dtype, device=x.device)
    _final_state[(sequences, cdiv(channels, STATE_BLOCK_D))](
        x, x if state is None else state, final, ends, tokens, channels, x.stride(0), x.stride(1),
        W=width, HAS_STATE=state is not None, PACKED=cu_seqlens is not None,
        BLOCK_D=STATE_BLOCK_D, BLOCK_W=max(2, next_power_of_2(width - 1)), num_warps=4,
    )  # fmt: skip
    return final


def initial_state_gradient(
    dy: Tensor, dfinal: Tensor | None, weight: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """Gradient of the initial state, in its shape and dtype; dy with stride 1 along D, weight contiguous."""
    tokens, channels = dy.shape[1:]
    width = weight.shape[1]
    ends = dy if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    dinitial = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=dy.device)
    _looped_dstate[(initial_state.shape[0], cdiv(channels, STATE_BLOCK_D))](
        dy, dy if dfinal is None else dfinal.contiguous(), weight, dinitial, ends,
        tokens, channels, dy.stride(0), dy.stride(1),
        W=width, HAS_FINAL=dfinal is not None, PACKED=cu_seqlens is not None,
        BLOCK_D=STATE_BLOCK_D, BLOCK_W=max(2, next_power_of_2(width - 1)), num_warps=4,
    )  # fmt: skip
    return dinitial


def looped_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the final state, as of the custom operator without activation, for W >= 2 taps."""
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    x, taps = rows_contiguous(x), weight.t().contiguous()
    state = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    sequence, ends = (x, x) if cu_seqlens is None else sequence_of_tokens(cu_seqlens, tokens)
    y = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    flags = {"W": width, "HAS_STATE": state is not None, "PACKED": cu_seqlens is not None}
    held = x if state is None else state
    bias = None if bias is None else bias.contiguous()
    _looped_fwd[(batch * cdiv(tokens, BLOCK_T), cdiv(channels, BLOCK_D))](
        x, taps, x if bias is None else bias, held, y, sequence, ends,
        tokens, channels, x.stride(0), x.stride(1),
        HAS_BIAS=bias is not None, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, **flags, num_warps=4,
    )  # fmt: skip
    return y, final_state(x, state, width, cu_seqlens)


def looped_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the initial state; [0] for one that did not come."""
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    x, dy = rows_contiguous(x), rows_contiguous(dy)
    late = x if dfinal is None else dfinal.contiguous()
    weight = weight.contiguous()
    state = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    sequence, ends = (x, x) if cu_seqlens is None else sequence_of_tokens(cu_seqlens, tokens)
    packed = cu_seqlens is not None
    dy_steps, x_steps = (dy.stride(0), dy.stride(1)), (x.stride(0), x.stride(1))
    column_blocks = cdiv(channels, BLOCK_D)
    dx = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    _looped_dx[(batch * cdiv(tokens, BLOCK_T), column_blocks)](
        dy, late, weight.t().contiguous(), dx, sequence, ends, tokens, channels, *dy_steps,
        W=width, HAS_FINAL=dfinal is not None, PACKED=packed, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    programs = batch * cdiv(tokens, SEGMENT)
    partial = torch.empty((programs, width + 1, channels), dtype=torch.float32, device=x.device)
    _looped_dweight[(programs, cdiv(channels, BLOCK_D // 2))](
        dy, x, x if state is None else state, partial, sequence, ends, tokens, channels, *dy_steps, *x_steps,
        W=width, HAS_STATE=state is not None, PACKED=packed,
        SEGMENT=SEGMENT, BLOCK_D=BLOCK_D // 2, BLOCK_W=next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    sums = partial.sum(0)  # [W+1, D]
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device).copy_(sums[:width].t())
    dbias = x.new_empty(0)
    if bias is not None:
        dbias = torch.empty(bias.shape, dtype=bias.dtype, device=x.device).copy_(sums[width])
    if initial_state is None:
        return dx, dweight, dbias, x.new_empty(0)
    return dx, dweight, dbias, initial_state_gradient(dy, dfinal, weight, initial_state, cu_seqlens)

"""Backward of the short convolution of packed sequences (`walk` serves whole rows), and of the initial state.

The value before the activation is computed again, not stored.

With g = dy act'(pre): dx_t = sum_j weight_{W-1-j} g_{t+j}, dweight_k = sum_t g_t x_{t-W+1+k}, dbias = sum_t g_t. A tile
needs g at W shifts, and these need the inputs at 2W-1 shifts, which stay in the cache. Sums over tokens are kept per
program and added up afterwards, so that every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import sigmoid
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.short_convolution.kernels.inputs import input_tile, rows_contiguous, sequence_of_tokens, spans
from zoo.ops.short_convolution.kernels.walk import backward_rows

BLOCK_T, BLOCK_D = 16, 64
TILES = 8  # tiles of BLOCK_T tokens per program


@triton.jit
def silu_gradient(dy, pre, EXACT: tl.constexpr):
    """dy d silu(pre) / d pre."""
    gate = sigmoid(pre, EXACT)
    return dy * gate * (1.0 + pre * (1.0 - gate))


@launched
def _convolution_bwd(
    dy_ptr, dfinal_ptr, x_ptr, weight_ptr, bias_ptr, state_ptr,  # [B,T,D] [S,D,W-1] [B,T,D] [D,W] [D] [S,D,W-1]
    dx_ptr, partial_ptr,  # -> [B,T,D], [programs,W+1,D]: taps, bias
    sequence_ptr, cu_ptr,  # [T] [S+1] if PACKED
    T, D, dy_stride_b, dy_stride_t, x_stride_b, x_stride_t,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_FINAL: tl.constexpr,
    PACKED: tl.constexpr, SILU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program owns TILES * BLOCK_T tokens of BLOCK_D channels of one row: their dx, their share of the sums."""
    blocks = tl.cdiv(T, TILES * BLOCK_T)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * (TILES * BLOCK_T)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    tap = tl.arange(0, BLOCK_W)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    x_row, dy_row = x_ptr + row * x_stride_b, dy_ptr + row * dy_stride_b
    dweight = tl.zeros([BLOCK_D, BLOCK_W], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(TILES):
        t = first + tile * BLOCK_T + tl.arange(0, BLOCK_T)
        s, start, end = spans(sequence_ptr, cu_ptr, t, row, T, PACKED)
        dx = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for j in tl.static_range(W):
            later = (t + j) < end
            dy_at = dy_row + (t + j)[:, None] * dy_stride_t + d[None, :]
            g = tl.load(dy_at, mask=later[:, None] & in_d[None, :], other=0.0).to(tl.float32)
            if SILU:
                pre = tl.zeros([BLOCK_T, BLOCK_D], tl.float32) + bias[None, :]
                for k in tl.static_range(W):
                    p = t + (j + k - (W - 1))
                    x = input_tile(x_row, state_ptr, p, s, start, end, d, in_d, D, x_stride_t, W, HAS_STATE)
                    pre += x * tl.load(weight_ptr + d * W + k, mask=in_d, other=0.0).to(tl.float32)[None, :]
                g = silu_gradient(g, pre, x_ptr.dtype.element_ty == tl.float32)
            dx += g * tl.load(weight_ptr + d * W + (W - 1 - j), mask=in_d, other=0.0).to(tl.float32)[None, :]
            if j == 0:
                dbias += tl.sum(g, axis=0)
                for k in tl.static_range(W):
                    p = t + (k - (W - 1))
                    x = input_tile(x_row, state_ptr, p, s, start, end, d, in_d, D, x_stride_t, W, HAS_STATE)
                    dweight += tl.where((tap == k)[None, :], tl.sum(g * x, axis=0)[:, None], 0.0)
        if HAS_FINAL and W > 1:
            c = t - (end - (W - 1))
            kept = (c >= 0) & (t < end)
            at = dfinal_ptr + (s[:, None] * D + d[None, :]) * (W - 1) + c[:, None]
            dx += tl.load(at, mask=kept[:, None] & in_d[None, :], other=0.0).to(tl.float32)
        at = dx_ptr + (row * T + t[:, None]) * D + d[None, :]
        tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=(t < T)[:, None] & in_d[None, :])
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (W + 1) * D
    tl.store(partial + tap[None, :] * D + d[:, None], dweight, mask=in_d[:, None] & (tap < W)[None, :])
    tl.store(partial + W * D + d, dbias, mask=in_d)


@launched
def _initial_state_bwd(
    dy_ptr, dfinal_ptr, x_ptr, weight_ptr, bias_ptr, state_ptr,  # as in _convolution_bwd
    dstate_ptr,  # -> [S,D,W-1]
    cu_ptr,  # [S+1] if PACKED
    T, D, dy_stride_b, dy_stride_t, x_stride_b, x_stride_t,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FINAL: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_D channels of the state gradient of one sequence: its first W-1 tokens see the state."""
    s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_W).to(tl.int64)
    in_d = d < D
    row, start, end = s, s * 0, s * 0 + T
    if PACKED:
        row, start, end = s * 0, tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    kept = in_d[:, None] & (c < W - 1)[None, :]
    at = (s * D + d) * (W - 1)
    # a sequence shorter than the state leaves its newer part in the final state
    stays = c - (end - start)
    dstate = tl.load(
        dfinal_ptr + at[:, None] + stays[None, :], mask=kept & ((stays >= 0) & HAS_FINAL)[None, :], other=0.0
    ).to(tl.float32)  # fmt: skip
    for i in tl.static_range(W - 1):
        live = in_d & (d * 0 + i < end - start)
        g = tl.load(dy_ptr + row * dy_stride_b + (start + i) * dy_stride_t + d, mask=live, other=0.0).to(tl.float32)
        if SILU:
            pre = bias
            for k in tl.static_range(W):
                if i + k < W - 1:
                    x = tl.load(state_ptr + at + (i + k), mask=live, other=0.0).to(tl.float32)
                else:
                    p = start + (i + k - (W - 1))
                    x = tl.load(x_ptr + row * x_stride_b + p * x_stride_t + d, mask=live, other=0.0).to(tl.float32)
                pre += x * tl.load(weight_ptr + d * W + k, mask=in_d, other=0.0).to(tl.float32)
            g = silu_gradient(g, pre, x_ptr.dtype.element_ty == tl.float32)
        seen = kept & (c >= i)[None, :]  # token i meets state column c with tap c - i
        weight = tl.load(weight_ptr + d[:, None] * W + (c - i)[None, :], mask=seen, other=0.0).to(tl.float32)
        dstate += g[:, None] * weight
    tl.store(dstate_ptr + at[:, None] + c[None, :], dstate.to(dstate_ptr.dtype.element_ty), mask=kept)


def convolution_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels; arguments and results as those of the custom operator.

    dx: where the gradient of x goes, with stride 1 along D; None for a tensor of its own.
    """
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    x, dy = rows_contiguous(x), rows_contiguous(dy)
    dfinal = None if dfinal is None else dfinal.contiguous()
    late = x if dfinal is None else dfinal
    taps = weight.contiguous()
    offset = x if bias is None else bias.contiguous()
    state = None if initial_state is None or width == 1 else initial_state.to(x.dtype).contiguous()
    packed = cu_seqlens is not None
    sequence, ends = (x, x) if cu_seqlens is None else sequence_of_tokens(cu_seqlens, tokens)
    programs = batch * cdiv(tokens, TILES * BLOCK_T)
    column_blocks = cdiv(channels, BLOCK_D)
    whole = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device) if dx is None or packed else dx
    if packed:
        partial = torch.empty((programs, width + 1, channels), dtype=torch.float32, device=x.device)
        _convolution_bwd[(programs, column_blocks)](
            dy, late, x, taps, offset, x if state is None else state, whole, partial, sequence, ends,
            tokens, channels, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1),
            W=width, HAS_BIAS=bias is not None, HAS_STATE=state is not None, HAS_FINAL=dfinal is not None,
            PACKED=packed, SILU=silu,
            BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, BLOCK_W=max(2, next_power_of_2(width)), TILES=TILES, num_warps=4,
        )  # fmt: skip
        sums = partial.sum(0)  # [W+1, D]
    else:
        sums = backward_rows(dy, dfinal, x, taps, bias, state, whole, silu)
    dx = whole if dx is None or dx is whole else dx.copy_(whole)
    dweight = torch.empty((channels, width), dtype=weight.dtype, device=x.device).copy_(sums[:width].t())
    dbias = x.new_empty(0)
    if bias is not None:
        dbias = torch.empty(bias.shape, dtype=bias.dtype, device=x.device).copy_(sums[width])
    if initial_state is None:
        return dx, dweight, dbias, x.new_empty(0)
    dinitial = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=x.device)
    if state is not None:
        _initial_state_bwd[(state.shape[0], column_blocks)](
            dy, late, x, taps, offset, state, dinitial, ends,
            tokens, channels, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1),
            W=width, HAS_BIAS=bias is not None, HAS_FINAL=dfinal is not None, PACKED=packed, SILU=silu,
            BLOCK_D=BLOCK_D, BLOCK_W=max(2, next_power_of_2(width - 1)), num_warps=1,
        )  # fmt: skip
    return dx, dweight, dbias, dinitial

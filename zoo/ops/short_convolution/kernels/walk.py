"""Short convolution of whole rows (nothing packed): a program walks down a span of tokens of its channels.

The last W inputs, and in the backward the last W gradients g of what the activation saw, stay in registers, so that
every element is loaded once, plus W-1 rows at the ends of a span. dx_t is complete when g_{t+W-1} is. Sums over tokens
are kept per program and added up afterwards, so that every run gives the same bits.
"""

# ruff: noqa: RUF005, SIM102 (Triton has no starred tuples; a constexpr if stands alone)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import INTERPRETED, sigmoid
from zoo.ops.kernels.rows import cdiv

# BLOCK_D channels and SPAN tokens of a program; UNROLL tokens are loaded ahead, a divisor of SPAN.
FORWARD = {"BLOCK_D": 256, "SPAN": 32, "UNROLL": 8, "num_warps": 2}
BACKWARD = {"BLOCK_D": 256, "SPAN": 128, "UNROLL": 4, "num_warps": 2}
MOST_SPANS = 65_535  # of a grid's second axis


@triton.jit
def place(T, D, BLOCK_D: tl.constexpr, SPAN: tl.constexpr, FLAT: tl.constexpr):
    """Number of this program's span, its row and first token (int64), its channels [BLOCK_D] (int32 saves registers).

    FLAT: the grid has one axis, because there are more spans than a second one holds.
    """
    block, span = tl.program_id(0), tl.program_id(1)
    if FLAT:
        blocks = tl.cdiv(D, BLOCK_D)
        span = block // blocks
        block = block % blocks
    spans = tl.cdiv(T, SPAN)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    return span, (span // spans).to(tl.int64), (span % spans).to(tl.int64) * SPAN, d


@triton.jit
def live(p, low, high, d, in_d):
    """[BLOCK_D]: in_d where low <= p < high, all scalars."""
    if INTERPRETED:  # it mistypes a scalar & a vector
        p = d * 0 + p
    return in_d & (p >= low) & (p < high)


@triton.jit
def earlier_row(x_row, state_row, p, T, d, in_d, x_stride_t, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """Input at position p < T, maybe before the first token, float32 [BLOCK_D]; state_row is [D,W-1]."""
    x = tl.load(x_row + p * x_stride_t + d, mask=live(p, 0, T, d, in_d), other=0.0).to(tl.float32)
    if HAS_STATE:
        c = p + (W - 1)
        x += tl.load(state_row + d * (W - 1) + c, mask=live(c, 0, W - 1, d, in_d), other=0.0).to(tl.float32)
    return x


@triton.jit
def weighted(window, taps, total, W: tl.constexpr):
    """total + sum_k window_k taps_k."""
    for k in tl.static_range(W):
        total += window[k] * taps[k]
    return total


@launched
def walk_fwd(
    x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr,  # [B,T,D] [D,W] [D] [B,D,W-1] -> [B,T,D]
    T, D, x_stride_b, x_stride_t,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, SILU: tl.constexpr,
    BLOCK_D: tl.constexpr, SPAN: tl.constexpr, UNROLL: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """One program owns SPAN tokens of BLOCK_D channels of one row."""
    _, row, first, d = place(T, D, BLOCK_D, SPAN, FLAT)
    in_d = d < D
    x_row = x_ptr + row * x_stride_b
    state_row = state_ptr + row * D * (W - 1)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    taps = (tl.load(weight_ptr + d * W, mask=in_d, other=0.0).to(tl.float32),)
    window = (earlier_row(x_row, state_row, first - W, T, d, in_d, x_stride_t, W, HAS_STATE),)
    for k in tl.static_range(1, W):
        taps = taps + (tl.load(weight_ptr + d * W + k, mask=in_d, other=0.0).to(tl.float32),)
        window = window + (earlier_row(x_row, state_row, first + (k - W), T, d, in_d, x_stride_t, W, HAS_STATE),)
    for i in range(0, SPAN, UNROLL):
        t = first + i
        ahead = (tl.load(x_row + t * x_stride_t + d, mask=live(t, 0, T, d, in_d), other=0.0),)
        for u in tl.static_range(1, UNROLL):
            ahead = ahead + (tl.load(x_row + (t + u) * x_stride_t + d, mask=live(t + u, 0, T, d, in_d), other=0.0),)
        for u in tl.static_range(UNROLL):
            window = window[1:] + (ahead[u].to(tl.float32),)
            y = weighted(window, taps, bias, W)
            if SILU:
                y = y * sigmoid(y, x_ptr.dtype.element_ty == tl.float32)
            tl.store(y_ptr + (row * T + t + u) * D + d, y.to(y_ptr.dtype.element_ty), mask=live(t + u, 0, T, d, in_d))


@triton.jit
def slope(dy, pre, SILU: tl.constexpr, EXACT: tl.constexpr):
    """dy times the derivative of the activation at pre."""
    if SILU:
        gate = sigmoid(pre, EXACT)
        dy = dy * gate * (1.0 + pre * (1.0 - gate))
    return dy


@triton.jit
def store_dx(
    dx_row, dfinal_row, p, first, T, d, in_d, dx_stride_t, grads, back, W: tl.constexpr, HAS_FINAL: tl.constexpr
):
    """dx at position p >= first from the W gradients that begin there, and from that of the final state, [D,W-1]."""
    dx = weighted(grads, back, tl.zeros_like(grads[0]), W)
    if HAS_FINAL and W > 1:
        if p >= T - (W - 1):
            c = p - (T - (W - 1))
            at = dfinal_row + d * (W - 1) + c
            dx += tl.load(at, mask=live(p, 0, T, d, in_d), other=0.0).to(tl.float32)
    tl.store(dx_row + p * dx_stride_t + d, dx.to(dx_row.dtype.element_ty), mask=live(p, first, T, d, in_d))


@launched
def walk_bwd(
    dy_ptr, dfinal_ptr, x_ptr, weight_ptr, bias_ptr, state_ptr,  # [B,T,D] [B,D,W-1] [B,T,D] [D,W] [D] [B,D,W-1]
    dx_ptr, partial_ptr,  # -> [B,T,D], [spans,W+1,D]: taps, bias
    T, D, dy_stride_b, dy_stride_t, x_stride_b, x_stride_t, dx_stride_b, dx_stride_t,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_FINAL: tl.constexpr, SILU: tl.constexpr,
    BLOCK_D: tl.constexpr, SPAN: tl.constexpr, UNROLL: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """One program owns SPAN tokens of BLOCK_D channels of one row: their dx, their share of the sums."""
    span, row, first, d = place(T, D, BLOCK_D, SPAN, FLAT)
    in_d = d < D
    x_row, dy_row = x_ptr + row * x_stride_b, dy_ptr + row * dy_stride_b
    dx_row, state_row = dx_ptr + row * dx_stride_b, state_ptr + row * D * (W - 1)
    dfinal_row = dfinal_ptr + row * D * (W - 1)
    zero = tl.zeros([BLOCK_D], tl.float32)
    bias, dbias = zero, zero
    if HAS_BIAS:
        bias += tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    taps = (tl.load(weight_ptr + d * W, mask=in_d, other=0.0).to(tl.float32),)
    back = taps
    window = (earlier_row(x_row, state_row, first - W, T, d, in_d, x_stride_t, W, HAS_STATE),)
    grads, dtaps = (zero,), (zero,)
    for k in tl.static_range(1, W):
        tap = tl.load(weight_ptr + d * W + k, mask=in_d, other=0.0).to(tl.float32)
        taps, back = taps + (tap,), (tap,) + back
        window = window + (earlier_row(x_row, state_row, first + (k - W), T, d, in_d, x_stride_t, W, HAS_STATE),)
        grads, dtaps = grads + (zero,), dtaps + (zero,)
    for i in range(0, SPAN, UNROLL):
        t = first + i
        ahead = (tl.load(x_row + t * x_stride_t + d, mask=live(t, 0, T, d, in_d), other=0.0),)
        dys = (tl.load(dy_row + t * dy_stride_t + d, mask=live(t, 0, T, d, in_d), other=0.0),)
        for u in tl.static_range(1, UNROLL):
            ahead = ahead + (tl.load(x_row + (t + u) * x_stride_t + d, mask=live(t + u, 0, T, d, in_d), other=0.0),)
            dys = dys + (tl.load(dy_row + (t + u) * dy_stride_t + d, mask=live(t + u, 0, T, d, in_d), other=0.0),)
        for u in tl.static_range(UNROLL):
            window = window[1:] + (ahead[u].to(tl.float32),)
            g = slope(
                dys[u].to(tl.float32), weighted(window, taps, bias, W), SILU, x_ptr.dtype.element_ty == tl.float32
            )
            g = tl.where(live(t + u, 0, T, d, in_d), g, 0.0)
            grads = grads[1:] + (g,)
            dbias += g
            grown = (dtaps[0] + g * window[0],)
            for k in tl.static_range(1, W):
                grown = grown + (dtaps[k] + g * window[k],)
            dtaps = grown
            store_dx(dx_row, dfinal_row, t + u - (W - 1), first, T, d, in_d, dx_stride_t, grads, back, W, HAS_FINAL)
    for u in tl.static_range(W - 1):  # the next span's gradients, for the last dx of this one
        t = first + (SPAN + u)
        window = window[1:] + (earlier_row(x_row, state_row, t, T, d, in_d, x_stride_t, W, False),)
        dy = tl.load(dy_row + t * dy_stride_t + d, mask=live(t, 0, T, d, in_d), other=0.0).to(tl.float32)
        g = slope(dy, weighted(window, taps, bias, W), SILU, x_ptr.dtype.element_ty == tl.float32)
        g = tl.where(live(t, 0, T, d, in_d), g, 0.0)
        grads = grads[1:] + (g,)
        store_dx(dx_row, dfinal_row, t - (W - 1), first, T, d, in_d, dx_stride_t, grads, back, W, HAS_FINAL)
    partial = partial_ptr + span.to(tl.int64) * (W + 1) * D
    for k in tl.static_range(W):
        tl.store(partial + k * D + d, dtaps[k], mask=in_d)
    tl.store(partial + W * D + d, dbias, mask=in_d)


def grid_of(spans: int, channels: int, block_d: int) -> tuple[tuple[int, ...], bool]:
    """The grid, channel blocks of one span side by side; and whether it has one axis (FLAT)."""
    blocks = cdiv(channels, block_d)
    flat = spans > MOST_SPANS
    return ((blocks * spans,) if flat else (blocks, spans)), flat


def forward_rows(x: Tensor, taps: Tensor, bias: Tensor | None, state: Tensor | None, y: Tensor, silu: bool) -> None:
    """Write y [B,T,D]; x with stride 1 along D, the rest contiguous."""
    batch, tokens, channels = x.shape
    options: dict[str, Any] = FORWARD
    spans = batch * cdiv(tokens, options["SPAN"])
    grid, flat = grid_of(spans, channels, options["BLOCK_D"])
    walk_fwd[grid](
        x, taps, x if bias is None else bias.contiguous(), x if state is None else state, y,
        tokens, channels, x.stride(0), x.stride(1),
        W=taps.shape[1], HAS_BIAS=bias is not None, HAS_STATE=state is not None, SILU=silu, FLAT=flat, **options,
    )  # fmt: skip


def backward_rows(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, taps: Tensor, bias: Tensor | None, state: Tensor | None, dx: Tensor,
    silu: bool,
) -> Tensor:  # fmt: skip
    """Write dx [B,T,D], with stride 1 along D; the sums of the taps and of the bias, float32 [W+1,D]."""
    batch, tokens, channels = x.shape
    options: dict[str, Any] = BACKWARD
    spans = batch * cdiv(tokens, options["SPAN"])
    partial = torch.empty((spans, taps.shape[1] + 1, channels), dtype=torch.float32, device=x.device)
    grid, flat = grid_of(spans, channels, options["BLOCK_D"])
    walk_bwd[grid](
        dy, x if dfinal is None else dfinal, x, taps, x if bias is None else bias.contiguous(),
        x if state is None else state, dx, partial,
        tokens, channels, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), dx.stride(0), dx.stride(1),
        W=taps.shape[1], HAS_BIAS=bias is not None, HAS_STATE=state is not None, HAS_FINAL=dfinal is not None,
        SILU=silu, FLAT=flat, **options,
    )  # fmt: skip
    return partial.sum(0)

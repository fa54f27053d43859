"""Forward of the short convolution: tiles of packed sequences (`walk` serves whole rows), and the final state."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import sigmoid
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.short_convolution.kernels.inputs import input_tile, rows_contiguous, sequence_of_tokens, spans
from zoo.ops.short_convolution.kernels.walk import forward_rows

BLOCK_T, BLOCK_D = 32, 64


@launched
def _convolution_fwd(
    x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr,  # [B,T,D] [D,W] [D] [S,D,W-1] -> [B,T,D]
    sequence_ptr, cu_ptr,  # [T] [S+1] if PACKED
    T, D, x_stride_b, x_stride_t,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr,
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
    for k in tl.static_range(W):
        x = input_tile(x_row, state_ptr, t + (k - (W - 1)), s, start, end, d, in_d, D, x_stride_t, W, HAS_STATE)
        y += x * tl.load(weight_ptr + d * W + k, mask=in_d, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = y * sigmoid(y, x_ptr.dtype.element_ty == tl.float32)
    at = y_ptr + (row * T + t[:, None]) * D + d[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(t < T)[:, None] & in_d[None, :])


@launched
def _final_state(
    x_ptr, state_ptr, final_ptr,  # [B,T,D] [S,D,W-1] -> [S,D,W-1]
    cu_ptr,  # [S+1] if PACKED
    T, D, x_stride_b, x_stride_t,
    W: tl.constexpr, HAS_STATE: tl.constexpr, PACKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_D channels of the final state of one sequence."""
    s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_W).to(tl.int64)
    row, start, end = s, s * 0, s * 0 + T
    if PACKED:
        row, start, end = s * 0, tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1)
    kept = (d < D)[:, None] & (c < W - 1)[None, :]
    p = end - (W - 1) + c
    value = tl.load(
        x_ptr + row * x_stride_b + p[None, :] * x_stride_t + d[:, None], mask=kept & (p >= start)[None, :], other=0.0
    )
    at = (s * D + d[:, None]) * (W - 1)
    if HAS_STATE:
        old = tl.load(state_ptr + at + (p - start + (W - 1))[None, :], mask=kept & (p < start)[None, :], other=0.0)
        value = tl.where((p < start)[None, :], old, value)
    tl.store(final_ptr + at + c[None, :], value, mask=kept)


def convolution_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; arguments and results as those of the custom operator."""
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    x, weight = rows_contiguous(x), weight.contiguous()
    state = None if initial_state is None or width == 1 else initial_state.to(x.dtype).contiguous()
    packed = cu_seqlens is not None
    sequence, ends = (x, x) if cu_seqlens is None else sequence_of_tokens(cu_seqlens, tokens)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    y = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    final = torch.empty((sequences, channels, width - 1), dtype=x.dtype, device=x.device)
    column_blocks = cdiv(channels, BLOCK_D)
    if packed:
        _convolution_fwd[(batch * cdiv(tokens, BLOCK_T), column_blocks)](
            x, weight, x if bias is None else bias.contiguous(), x if state is None else state, y, sequence, ends,
            tokens, channels, x.stride(0), x.stride(1),
            W=width, HAS_BIAS=bias is not None, HAS_STATE=state is not None, PACKED=packed, SILU=silu,
            BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=4,
        )  # fmt: skip
    else:
        forward_rows(x, weight, bias, state, y, silu)
    if width > 1:
        _final_state[(sequences, column_blocks)](
            x, x if state is None else state, final, ends, tokens, channels, x.stride(0), x.stride(1),
            W=width, HAS_STATE=state is not None, PACKED=packed,
            BLOCK_D=BLOCK_D, BLOCK_W=max(2, next_power_of_2(width - 1)), num_warps=1,
        )  # fmt: skip
    return y, final

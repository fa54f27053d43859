"""What the forward and the backward of the short convolution share: spans of sequences, inputs with their history."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def spans(sequence_ptr, cu_ptr, t, row, T, PACKED: tl.constexpr):
    """Sequence, start and end of the tokens t, each [BLOCK_T] int64; start = end = 0 beyond the last token."""
    in_t = t < T
    if PACKED:
        s = tl.load(sequence_ptr + t, mask=in_t, other=0)
        start = tl.load(cu_ptr + s, mask=in_t, other=0)
        end = tl.load(cu_ptr + s + 1, mask=in_t, other=0)
    else:
        s = t * 0 + row
        start = t * 0
        end = tl.where(in_t, start + T, 0)
    return s, start, end


@triton.jit
def input_tile(
    x_row, state_ptr,  # [T,D] of this row, [S,D,W-1]
    p, s, start, end, d, in_d, D, x_stride_t, W: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Inputs at positions p of sequences s, float32 [BLOCK_T, BLOCK_D]: tokens, before them the state, zeros beyond."""
    inside = (p >= start) & (p < end)
    x = tl.load(x_row + p[:, None] * x_stride_t + d[None, :], mask=inside[:, None] & in_d[None, :], other=0.0)
    x = x.to(tl.float32)
    if HAS_STATE:
        c = p - start + (W - 1)
        earlier = (c >= 0) & (p < start) & (start < end)
        at = state_ptr + (s[:, None] * D + d[None, :]) * (W - 1) + c[:, None]
        x += tl.load(at, mask=earlier[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    return x


def rows_contiguous(x: Tensor) -> Tensor:
    """x [B,T,D] with stride 1 along D; a slice of a projection stays as it is."""
    return x if x.stride(2) == 1 else x.contiguous()


def sequence_of_tokens(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Sequence of each token int64 [T], and the boundaries int64 [S+1]."""
    ends = cu_seqlens.to(torch.int64).contiguous()
    token = torch.arange(tokens, device=ends.device)
    return torch.searchsorted(ends[1:].contiguous(), token, right=True).clamp_(max=ends.numel() - 2), ends

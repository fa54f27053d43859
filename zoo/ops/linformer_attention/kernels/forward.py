"""Attention to the projected keys: all of them on chip, so that the softmax is one pass without a running maximum."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import dot, exponential
from zoo.ops.kernels.rows import cdiv
from zoo.ops.kernels.widths import cut_width
from zoo.ops.linformer_attention.kernels.tiles import attend_tiles
from zoo.ops.softmax_attention.kernels.tiles import wide_rows


@launched
def _attend_fwd(
    q_ptr, keys_ptr, values_ptr, spans_ptr,  # [B,T,H,P] [B,R,G,P] [B,R,G,P] [B,2]
    y_ptr,  # -> [B,T,H,P]
    T, R, H, G, t_tiles, scale, q_stride_b, q_stride_t, q_stride_h,
    HEADS_PER_GROUP: tl.constexpr, P: tl.constexpr, HAS_SPANS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_T queries of one head of one row."""
    tile = tl.program_id(0) % t_tiles
    head = (tl.program_id(0) // t_tiles) % H
    b = (tl.program_id(0) // (t_tiles * H)).to(tl.int64)
    group = head // HEADS_PER_GROUP
    t = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    r, p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    in_t, in_r, in_p = t < T, r < R, p < P
    real = in_t
    if HAS_SPANS:
        first, length = tl.load(spans_ptr + b * 2), tl.load(spans_ptr + b * 2 + 1)
        real = in_t & (t >= first) & (t < first + length)
    q_at = q_ptr + b * q_stride_b + head.to(tl.int64) * q_stride_h
    q = tl.load(q_at + t[:, None] * q_stride_t + p[None, :], mask=real[:, None] & in_p[None, :], other=0.0)
    row = ((b * R + r) * G + group) * P
    keys = tl.load(keys_ptr + row[None, :] + p[:, None], mask=in_r[None, :] & in_p[:, None], other=0.0)  # [P,R]
    values = tl.load(values_ptr + row[:, None] + p[None, :], mask=in_r[:, None] & in_p[None, :], other=0.0)  # [R,P]
    logits = tl.where(in_r[None, :], dot(q, keys), float("-inf"))  # [BLOCK_T, BLOCK_R]
    below = (logits - tl.max(logits, axis=1)[:, None]) * scale  # scaled logits would be rounded more
    weights = exponential(below, q.dtype == tl.float32)
    y = dot(weights.to(values.dtype), values) / tl.sum(weights, axis=1)[:, None]
    y = tl.where(real[:, None], y, 0.0)
    y_at = y_ptr + ((b * T + t) * H + head)[:, None] * P + p[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=in_t[:, None] & in_p[None, :])


def attend(q: Tensor, keys: Tensor, values: Tensor, spans: Tensor | None) -> Tensor:
    """y [B,T,H,P], 0 at padded slots.

    q: [B,T,H,P]. keys, values: [B,R,G,P], contiguous, in the dtype of q. spans: as in `project`.
    """
    wanted = q.shape[3]
    q, keys, values = wide_rows(q), wide_rows(keys), wide_rows(values)
    batch, tokens, heads, width = q.shape
    rank, groups = keys.shape[1:3]
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tiles = attend_tiles(rank, width, q.element_size())
    t_tiles = cdiv(tokens, tiles["BLOCK_T"])
    _attend_fwd[(batch * heads * t_tiles,)](
        q, keys, values, q if spans is None else spans, y,
        tokens, rank, heads, groups, t_tiles, wanted**-0.5,
        q.stride(0), q.stride(1), q.stride(2),
        HEADS_PER_GROUP=heads // groups, P=width, HAS_SPANS=spans is not None, **tiles,
    )  # fmt: skip
    return cut_width(y, wanted)

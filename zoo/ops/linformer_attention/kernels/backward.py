"""Backward of the attention to projected keys: queries first, then keys and values, summed over parts of the length.

With w the softmax weights and dw = dy v^T: delta = sum_r w dw, ds = w (dw - delta), dq = scale ds k, dk = scale ds^T q,
dv = w^T dy. The first kernel holds all keys, so that each query's maximum, sum and delta come from its tile; the second
reads them, which is more exact than a rounded log-sum-exp, and builds w^T and ds^T directly. Its sums over queries are
split over programs and added up afterwards. No atomics.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import add_product, dot, exponential
from zoo.ops.kernels.rows import cdiv
from zoo.ops.kernels.widths import cut_width
from zoo.ops.linformer_attention.kernels.tiles import attend_tiles, gather_tiles, split_length
from zoo.ops.softmax_attention.kernels.tiles import wide_rows


@launched
def _attend_bwd_queries(
    q_ptr, dy_ptr, keys_ptr, values_ptr, spans_ptr,  # shapes as in the forward; dy like q
    dq_ptr, top_ptr, share_ptr, delta_ptr,  # -> [B,T,H,P]; [B,H,T] each: maximum of q k, 1 / sum, delta
    T, R, H, G, t_tiles, scale,
    q_stride_b, q_stride_t, q_stride_h, dy_stride_b, dy_stride_t, dy_stride_h,
    HEADS_PER_GROUP: tl.constexpr, P: tl.constexpr, HAS_SPANS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program owns the gradient of BLOCK_T queries of one head of one row."""
    tile = tl.program_id(0) % t_tiles
    head = ((tl.program_id(0) // t_tiles) % H).to(tl.int64)
    b = (tl.program_id(0) // (t_tiles * H)).to(tl.int64)
    t = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    r, p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    in_t, in_r, in_p = t < T, r < R, p < P
    real = in_t
    if HAS_SPANS:
        first, length = tl.load(spans_ptr + b * 2), tl.load(spans_ptr + b * 2 + 1)
        real = in_t & (t >= first) & (t < first + length)
    inside = real[:, None] & in_p[None, :]
    q_at = q_ptr + b * q_stride_b + head * q_stride_h
    q = tl.load(q_at + t[:, None] * q_stride_t + p[None, :], mask=inside, other=0.0)
    dy_at = dy_ptr + b * dy_stride_b + head * dy_stride_h
    dy = tl.load(dy_at + t[:, None] * dy_stride_t + p[None, :], mask=inside, other=0.0)
    row = ((b * R + r) * G + head // HEADS_PER_GROUP) * P
    held = in_r[:, None] & in_p[None, :]
    keys = tl.load(keys_ptr + row[:, None] + p[None, :], mask=held, other=0.0)  # [R,P]
    values = tl.load(values_ptr + row[:, None] + p[None, :], mask=held, other=0.0)
    logits = tl.where(in_r[None, :], dot(q, tl.trans(keys)), float("-inf"))
    top = tl.max(logits, axis=1)
    below = (logits - top[:, None]) * scale  # scaled logits would be rounded more
    weights = exponential(below, q.dtype == tl.float32)  # [BLOCK_T, BLOCK_R]
    share = tl.div_rn(1.0, tl.sum(weights, axis=1))
    weights = weights * share[:, None]
    dweights = dot(dy, tl.trans(values))
    delta = tl.sum(weights * dweights, axis=1)
    ds = weights * (dweights - delta[:, None])
    dq = dot(ds.to(keys.dtype), keys) * scale
    dq_at = dq_ptr + ((b * T + t) * H + head)[:, None] * P + p[None, :]
    tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), mask=in_t[:, None] & in_p[None, :])
    stat_at = (b * H + head) * T + t
    tl.store(top_ptr + stat_at, top, mask=in_t)
    tl.store(share_ptr + stat_at, share, mask=in_t)
    tl.store(delta_ptr + stat_at, delta, mask=in_t)


@launched
def _attend_bwd_keys(
    q_ptr, dy_ptr, keys_ptr, values_ptr, top_ptr, share_ptr, delta_ptr, spans_ptr,
    dkeys_ptr, dvalues_ptr,  # -> [parts,B,R,G,P], float32
    B, T, R, H, G, span, r_tiles, scale,
    q_stride_b, q_stride_t, q_stride_h, dy_stride_b, dy_stride_t, dy_stride_h,
    HEADS_PER_GROUP: tl.constexpr, P: tl.constexpr, HAS_SPANS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program owns the gradients of BLOCK_R keys and values of one group of one row, over `span` queries a head."""
    tile = tl.program_id(0) % r_tiles
    group = ((tl.program_id(0) // r_tiles) % G).to(tl.int64)
    b = ((tl.program_id(0) // (r_tiles * G)) % B).to(tl.int64)
    part = (tl.program_id(0) // (r_tiles * G * B)).to(tl.int64)
    r, p = tile * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    held = (r < R)[:, None] & (p < P)[None, :]
    row = ((b * R + r) * G + group) * P
    keys = tl.load(keys_ptr + row[:, None] + p[None, :], mask=held, other=0.0)  # [R,P]
    values = tl.load(values_ptr + row[:, None] + p[None, :], mask=held, other=0.0)
    dkeys = tl.zeros([BLOCK_R, BLOCK_P], tl.float32)
    dvalues = tl.zeros([BLOCK_R, BLOCK_P], tl.float32)
    dkeys_lost, dvalues_lost = dkeys, dvalues
    start, stop = part * span, tl.minimum((part + 1) * span, T)
    if HAS_SPANS:
        first, length = tl.load(spans_ptr + b * 2), tl.load(spans_ptr + b * 2 + 1)
        stop = tl.minimum(stop, first + length)
        start = tl.maximum(start, first)
    for each in range(0, HEADS_PER_GROUP):
        head = group * HEADS_PER_GROUP + each
        q_at = q_ptr + b * q_stride_b + head * q_stride_h
        dy_at = dy_ptr + b * dy_stride_b + head * dy_stride_h
        stat_at = (b * H + head) * T
        for at in range(start, stop, BLOCK_T):
            t = at + tl.arange(0, BLOCK_T)  # int64
            in_t = t < stop
            inside = in_t[:, None] & (p < P)[None, :]
            q = tl.load(q_at + t[:, None] * q_stride_t + p[None, :], mask=inside, other=0.0)
            dy = tl.load(dy_at + t[:, None] * dy_stride_t + p[None, :], mask=inside, other=0.0)
            top = tl.load(top_ptr + stat_at + t, mask=in_t, other=0.0)
            share = tl.load(share_ptr + stat_at + t, mask=in_t, other=0.0)
            delta = tl.load(delta_ptr + stat_at + t, mask=in_t, other=0.0)
            logits = dot(keys, tl.trans(q))  # [BLOCK_R, BLOCK_T]
            weights = exponential((logits - top[None, :]) * scale, q.dtype == tl.float32) * share[None, :]
            dvalues, dvalues_lost = add_product(dvalues, dvalues_lost, weights.to(dy.dtype), dy)
            ds = weights * (dot(values, tl.trans(dy)) - delta[None, :])
            dkeys, dkeys_lost = add_product(dkeys, dkeys_lost, ds.to(q.dtype), q)
    out = (((part * B + b) * R + r) * G + group) * P
    tl.store(dkeys_ptr + out[:, None] + p[None, :], dkeys * scale, mask=held)
    tl.store(dvalues_ptr + out[:, None] + p[None, :], dvalues, mask=held)


def attend_backward(
    dy: Tensor, q: Tensor, keys: Tensor, values: Tensor, spans: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [B,T,H,P], and of the projected keys and values, [B,R,G,P]; all contiguous, in the dtype of q."""
    wanted, dy, q = q.shape[3], wide_rows(dy), wide_rows(q)
    keys, values = wide_rows(keys.contiguous()), wide_rows(values.contiguous())
    batch, tokens, heads, width = q.shape
    rank, groups = keys.shape[1:3]
    scale = wanted**-0.5
    marks = q if spans is None else spans
    strides = (q.stride(0), q.stride(1), q.stride(2), dy.stride(0), dy.stride(1), dy.stride(2))
    options = {"HEADS_PER_GROUP": heads // groups, "P": width, "HAS_SPANS": spans is not None}
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stats = torch.empty((3, batch, heads, tokens), dtype=torch.float32, device=q.device)
    tiles = attend_tiles(rank, width, q.element_size())
    t_tiles = cdiv(tokens, tiles["BLOCK_T"])
    _attend_bwd_queries[(batch * heads * t_tiles,)](
        q, dy, keys, values, marks, dq, *stats,
        tokens, rank, heads, groups, t_tiles, scale, *strides, **options, **tiles,
    )  # fmt: skip
    tiles = gather_tiles(rank, width, q.element_size())
    r_tiles = cdiv(rank, tiles["BLOCK_R"])
    programs = batch * groups * r_tiles
    parts, span = split_length(tokens, programs, tiles["BLOCK_T"])
    partial = torch.empty((2, parts, *keys.shape), dtype=torch.float32, device=q.device)
    _attend_bwd_keys[(parts * programs,)](
        q, dy, keys, values, *stats, marks, partial[0], partial[1],
        batch, tokens, rank, heads, groups, span, r_tiles, scale, *strides, **options, **tiles,
    )  # fmt: skip
    dkeys, dvalues = (partial[:, 0] if parts == 1 else partial.sum(1)).to(q.dtype).unbind(0)
    return cut_width(dq, wanted), cut_width(dkeys, wanted), cut_width(dvalues, wanted)

"""Attention to projected keys in half precision: a program keeps the keys and values of a head and walks over queries.

Forward: y = softmax(scale q k^T) v, and the log-sum-exp of each query. Backward, five products in one pass: with w the
softmax weights and delta = sum_p dy y, ds = w (dy v^T - delta), dq = scale ds k, dk = scale ds^T q, dv = w^T dy. Tiles
are transposed, [keys, queries], so that w and ds enter the sums over queries from registers. A sum over queries that
is split over programs is added up afterwards. No atomics.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import dot
from zoo.ops.kernels.rows import cdiv
from zoo.ops.kernels.widths import cut_width
from zoo.ops.linformer_attention.kernels.tiles import held_tiles
from zoo.ops.softmax_attention.kernels.tiles import wide_rows


@launched
def held_fwd(
    q_ptr, keys_ptr, values_ptr, spans_ptr,  # [B,T,H,P] [B,R,G,P] [B,R,G,P] [B,2]
    y_ptr, lse_ptr,  # -> [B,T,H,P]; [B,H,T], of base 2, float32
    T, R, H, G, span, parts, scale_log2, q_stride_b, q_stride_t, q_stride_h,
    HEADS_PER_GROUP: tl.constexpr, P: tl.constexpr, HAS_SPANS: tl.constexpr, KEEP: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program owns `span` queries of one head of one row. KEEP: write lse. WHOLE: R is BLOCK_R, P is BLOCK_P."""
    part = (tl.program_id(0) % parts).to(tl.int64)
    head = ((tl.program_id(0) // parts) % H).to(tl.int64)
    b = (tl.program_id(0) // (parts * H)).to(tl.int64)
    r, p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    row = ((b * R + r) * G + head // HEADS_PER_GROUP) * P
    at_held = row[:, None] + p[None, :]
    if WHOLE:
        keys, values = tl.load(keys_ptr + at_held), tl.load(values_ptr + at_held)  # [R,P]
    else:
        held = (r < R)[:, None] & (p < P)[None, :]
        keys = tl.load(keys_ptr + at_held, mask=held, other=0.0)
        values = tl.load(values_ptr + at_held, mask=held, other=0.0)
    first, stop = b * 0, b * 0 + T
    if HAS_SPANS:
        first = tl.load(spans_ptr + b * 2)
        stop = first + tl.load(spans_ptr + b * 2 + 1)
    q_at = q_ptr + b * q_stride_b + head * q_stride_h
    y_at = y_ptr + (b * T * H + head) * P
    for at in range(part * span, tl.minimum((part + 1) * span, T), BLOCK_T):
        t = at + tl.arange(0, BLOCK_T)  # int64
        real = (t >= first) & (t < stop)
        q = tl.load(q_at + t[:, None] * q_stride_t + p[None, :], mask=real[:, None] & (p < P)[None, :], other=0.0)
        logits = dot(q, tl.trans(keys))  # [BLOCK_T, BLOCK_R]
        if not WHOLE:
            logits = tl.where((r < R)[None, :], logits, float("-inf"))
        top = tl.max(logits, axis=1) * scale_log2
        weights = tl.exp2(logits * scale_log2 - top[:, None])
        total = tl.sum(weights, axis=1)
        y = dot(weights.to(values.dtype), values) / total[:, None]
        y = tl.where(real[:, None], y, 0.0)
        in_t = t < T
        tl.store(
            y_at + (t * H * P)[:, None] + p[None, :], y.to(y_ptr.dtype.element_ty),
            mask=in_t[:, None] & (p < P)[None, :],
        )  # fmt: skip
        if KEEP:
            tl.store(lse_ptr + (b * H + head) * T + t, top + tl.log2(total), mask=in_t)


@triton.jit
def _load_keys(keys_ptr, values_ptr, row_stride, r, R, p, P: tl.constexpr, WHOLE: tl.constexpr):
    """Keys and values r, each [BLOCK_R,BLOCK_P], of one head."""
    at = r.to(tl.int64)[:, None] * row_stride + p[None, :]
    if WHOLE:
        keys, values = tl.load(keys_ptr + at), tl.load(values_ptr + at)
    else:
        inside = (r < R)[:, None] & (p < P)[None, :]
        keys = tl.load(keys_ptr + at, mask=inside, other=0.0)
        values = tl.load(values_ptr + at, mask=inside, other=0.0)
    return keys, values


@triton.jit
def _store_sums(dkeys_ptr, dvalues_ptr, row_stride, r, R, p, dkeys, dvalues, P: tl.constexpr):
    """Write the gradients of keys and values r."""
    at, inside = r.to(tl.int64)[:, None] * row_stride + p[None, :], (r < R)[:, None] & (p < P)[None, :]
    tl.store(dkeys_ptr + at, dkeys.to(dkeys_ptr.dtype.element_ty), mask=inside)
    tl.store(dvalues_ptr + at, dvalues.to(dvalues_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _meet(keys, values, q, dy, lse, delta, scale_log2, dkeys, dvalues):
    """What queries [BLOCK_T,BLOCK_P] add to the gradients of keys and values [SIZE,BLOCK_P]; and ds, [SIZE,BLOCK_T]."""
    weights = tl.exp2(dot(keys, tl.trans(q)) * scale_log2 - lse[None, :])
    dvalues = dot(weights.to(dy.dtype), dy, dvalues)
    ds = (weights * (dot(values, tl.trans(dy)) - delta[None, :])).to(q.dtype)
    return ds, dot(ds, q, dkeys), dvalues


@launched
def held_bwd(
    q_ptr, dy_ptr, y_ptr, keys_ptr, values_ptr, lse_ptr, spans_ptr,  # dy like q, y contiguous
    dq_ptr, dkeys_ptr, dvalues_ptr,  # -> [B,T,H,P]; [parts,B,R,G,P]
    B, T, R, H, G, span, scale, scale_log2,
    q_stride_b, q_stride_t, q_stride_h, dy_stride_b, dy_stride_t, dy_stride_h,
    HEADS_PER_GROUP: tl.constexpr, P: tl.constexpr, HAS_SPANS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One program owns `span` queries of all heads of a group of one row, and what the group's keys and values get.

    HALVES: 2 to meet the keys in two halves, which need half the registers for their scores.
    """
    group = (tl.program_id(0) % G).to(tl.int64)
    b = ((tl.program_id(0) // G) % B).to(tl.int64)
    part = (tl.program_id(0) // (G * B)).to(tl.int64)
    SIZE: tl.constexpr = BLOCK_R // HALVES
    r, p = tl.arange(0, SIZE), tl.arange(0, BLOCK_P)
    held, row_stride = (b * R * G + group) * P, G * P
    keys, values = _load_keys(keys_ptr + held, values_ptr + held, row_stride, r, R, p, P, WHOLE)
    dkeys, dvalues = tl.zeros([SIZE, BLOCK_P], tl.float32), tl.zeros([SIZE, BLOCK_P], tl.float32)
    if HALVES == 2:
        keys_2, values_2 = _load_keys(keys_ptr + held, values_ptr + held, row_stride, SIZE + r, R, p, P, WHOLE)
        dkeys_2, dvalues_2 = tl.zeros([SIZE, BLOCK_P], tl.float32), tl.zeros([SIZE, BLOCK_P], tl.float32)
    first, stop = b * 0, b * 0 + T
    if HAS_SPANS:
        first = tl.load(spans_ptr + b * 2)
        stop = first + tl.load(spans_ptr + b * 2 + 1)
    for each in range(0, HEADS_PER_GROUP):
        head = group * HEADS_PER_GROUP + each
        q_at = q_ptr + b * q_stride_b + head * q_stride_h
        dy_at = dy_ptr + b * dy_stride_b + head * dy_stride_h
        own = (b * T * H + head) * P
        for at in range(part * span, tl.minimum((part + 1) * span, T), BLOCK_T):
            t = at + tl.arange(0, BLOCK_T)  # int64
            real = (t >= first) & (t < stop)
            inside = real[:, None] & (p < P)[None, :]
            own_at = own + (t * H * P)[:, None] + p[None, :]
            q = tl.load(q_at + t[:, None] * q_stride_t + p[None, :], mask=inside, other=0.0)
            dy = tl.load(dy_at + t[:, None] * dy_stride_t + p[None, :], mask=inside, other=0.0)
            y = tl.load(y_ptr + own_at, mask=inside, other=0.0)
            lse = tl.load(lse_ptr + (b * H + head) * T + t, mask=real, other=float("inf"))  # weights of others are 0
            delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), axis=1)
            ds, dkeys, dvalues = _meet(keys, values, q, dy, lse, delta, scale_log2, dkeys, dvalues)
            dq = dot(tl.trans(keys), ds)  # [BLOCK_P, BLOCK_T]; rows beyond R are those of zero keys
            if HALVES == 2:
                ds, dkeys_2, dvalues_2 = _meet(keys_2, values_2, q, dy, lse, delta, scale_log2, dkeys_2, dvalues_2)
                dq = dot(tl.trans(keys_2), ds, dq)
            tl.store(
                dq_ptr + own + (t * H * P)[None, :] + p[:, None], (dq * scale).to(dq_ptr.dtype.element_ty),
                mask=(t < T)[None, :] & (p < P)[:, None],
            )  # fmt: skip
    held += part * B * R * G * P
    _store_sums(dkeys_ptr + held, dvalues_ptr + held, row_stride, r, R, p, dkeys * scale, dvalues, P)
    if HALVES == 2:
        r += SIZE
        _store_sums(dkeys_ptr + held, dvalues_ptr + held, row_stride, r, R, p, dkeys_2 * scale, dvalues_2, P)


def attend_held(q: Tensor, keys: Tensor, values: Tensor, spans: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """y [B,T,H,P], 0 at padded slots, and with `keep` what the backward needs, float32 [B,H,T], else an empty one.

    q: [B,T,H,P], half precision. keys, values: [B,R,G,P], contiguous, in the dtype of q. spans: as in `project`.
    """
    wanted = q.shape[3]
    q, keys, values, scale = wide_rows(q), wide_rows(keys), wide_rows(values), wanted**-0.5
    batch, tokens, heads, width = q.shape
    rank, groups = keys.shape[1:3]
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens) if keep else (0,), dtype=torch.float32, device=q.device)
    tiles, shape, span = held_tiles(rank, width, tokens, batch * heads, backward=False)
    parts = cdiv(tokens, span)
    held_fwd[(batch * heads * parts,)](
        q, keys, values, q if spans is None else spans, y, lse,
        tokens, rank, heads, groups, span, parts, scale * math.log2(math.e), q.stride(0), q.stride(1), q.stride(2),
        HEADS_PER_GROUP=heads // groups, P=width, HAS_SPANS=spans is not None, KEEP=keep, WHOLE=shape == (rank, width),
        **tiles,
    )  # fmt: skip
    return cut_width(y, wanted), lse


def attend_held_backward(
    dy: Tensor, q: Tensor, y: Tensor, keys: Tensor, values: Tensor, lse: Tensor, spans: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [B,T,H,P], and of the projected keys and values, [B,R,G,P]; contiguous, in the dtype of q.

    dy: like q. y, lse: results of `attend_held`.
    """
    wanted, dy, q, y = q.shape[3], wide_rows(dy), wide_rows(q), wide_rows(y)
    keys, values, scale = wide_rows(keys), wide_rows(values), wanted**-0.5
    batch, tokens, heads, width = q.shape
    rank, groups = keys.shape[1:3]
    tiles, shape, span = held_tiles(rank, width, tokens, batch * groups, backward=True)
    parts = cdiv(tokens, span)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kind = q.dtype if parts == 1 else torch.float32
    partial = torch.empty((2, parts, *keys.shape), dtype=kind, device=q.device)
    held_bwd[(parts * batch * groups,)](
        q, dy, y, keys, values, lse, q if spans is None else spans, dq, partial[0], partial[1],
        batch, tokens, rank, heads, groups, span, scale, scale * math.log2(math.e),
        q.stride(0), q.stride(1), q.stride(2), dy.stride(0), dy.stride(1), dy.stride(2),
        HEADS_PER_GROUP=heads // groups, P=width, HAS_SPANS=spans is not None, WHOLE=shape == (rank, width), **tiles,
    )  # fmt: skip
    dkeys, dvalues = (partial[:, 0] if parts == 1 else partial.sum(1).to(q.dtype)).unbind(0)
    return cut_width(dq, wanted), cut_width(dkeys, wanted), cut_width(dvalues, wanted)

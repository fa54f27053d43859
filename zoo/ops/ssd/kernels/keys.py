"""Gradients of B and C from the states at the borders of the chunks and the products of pairs inside them."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import dot
from zoo.ops.semiseparable.kernels.chunks import Chunks, place_of, tile, token_rows


@triton.jit
def _side(
    v_ptr, own_ptr, other_ptr, s_ptr, r_ptr, states_ptr, R_ptr, K_ptr, out_ptr, read_ptr, flow_ptr,
    chunk, part, group, n0, first, live, rows, COUNT, v_stride, own_stride, other_stride,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADS: tl.constexpr, FINER: tl.constexpr, OF_B: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, Q)
    n = n0 + tl.arange(0, BLOCK_N)
    p = tl.arange(0, P)
    total = tl.zeros([Q, BLOCK_N], tl.float32)
    own = tile(own_ptr, first, live, own_stride, group * N + n0, i, BLOCK_N)
    heads = (n0 // BLOCK_N).to(tl.int64) * H  # before this plane of sums
    for k in range(0, HEADS):
        h = part * HEADS + k
        slot = chunk.to(tl.int64) * H + h
        sums = (h.to(tl.int64) * COUNT + chunk) * Q
        v = tile(v_ptr, first, live, v_stride, h * P, i, P)
        states = tl.load(states_ptr + (slot * N + n[:, None]) * P + p[None, :])
        s = tl.load(s_ptr + sums + i)
        if OF_B:
            # Everything that v is multiplied by is loaded as vectors: then the compiler takes it from shared memory
            # once, in the layout of both products; else twice, of which once with conflicts of banks (Triton 3.6).
            r = tl.load(r_ptr + sums + i)
            last = tl.load(s_ptr + sums + (Q - 1) + tl.zeros_like(i))
            scaled = v * tl.exp2(last - r)[:, None]
        else:
            scaled = v * tl.exp2(s)[:, None]
        read = tl.sum(dot(own, states) * scaled, 1)
        if OF_B:
            read *= tl.exp2(r - s)
        tl.store(read_ptr + ((heads + h) * COUNT + chunk) * Q + i, read)
        if not OF_B:
            R = tl.load(R_ptr + (slot * N + n[:, None]) * P + p[None, :])
            # The diagonal of a product. Of a sum over elements of `states`, which products read in shared memory, dC
            # differed from run to run (Triton 3.6): the tile is given to the next head too early.
            met = tl.where(p[:, None] == p[None, :], dot(tl.trans(states), R), 0.0)
            last = tl.load(s_ptr + sums + Q - 1)
            tl.store(flow_ptr + (heads + h) * COUNT + chunk, tl.sum(met) * tl.exp2(last))
        total = dot(scaled.to(v.dtype), tl.trans(states), total)
    K = tl.zeros([Q, Q], tl.float32)
    for f in range(0, FINER):
        corner = K_ptr + ((chunk.to(tl.int64) * (H // HEADS) + part) * FINER + f) * Q * Q
        if OF_B:
            K += tl.load(corner + i[None, :] * Q + i[:, None], mask=i[None, :] >= i[:, None], other=0.0)
        else:
            K += tl.load(corner + i[:, None] * Q + i[None, :], mask=i[None, :] <= i[:, None], other=0.0)
    other = tile(other_ptr, first, live, other_stride, group * N + n0, i, BLOCK_N)
    total = dot(K.to(other.dtype), other, total)
    at = (part % (H // G // HEADS) * rows + first + i[:, None]) * (G * N) + group * N + n[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=(i < live)[:, None])


@launched(do_not_specialize=["T", "PER_SEQUENCE", "COUNT", "rows"])
def keys_kernel(
    x_ptr, dy_ptr, B_ptr, C_ptr, s_ptr, r_ptr, S_ptr, R_ptr, K_ptr,
    dB_ptr, dC_ptr, read_ptr, kept_ptr, flow_ptr, table_ptr,
    T, PER_SEQUENCE, COUNT, rows, x_stride, dy_stride, B_stride, C_stride,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADS: tl.constexpr, FINER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, HEADS heads of one group and BLOCK_N modes. Even programs: dC, read, flow. Odd ones: dB, kept.

    dC_i = sum_h 2^s_i S dy_i + sum_j K_ij B_j; dB_j = sum_h 2^(e-r_j) R x_j + sum_i K_ij C_i; sums over the own heads,
    in parts [parts of a group,B,T,G,N]. read = 2^s_i <C_i, S dy_i>, kept = 2^(e-s_j) <B_j, R x_j>, both
    [N/BLOCK_N,H,count,Q]; flow [N/BLOCK_N,H,count] = 2^e <S,R>; sums over the own modes. FINER: K's parts per one of
    here.
    """
    parts: tl.constexpr = H // HEADS
    planes: tl.constexpr = N // BLOCK_N
    chunk = tl.program_id(0) // (2 * parts * planes)
    part = tl.program_id(0) // (2 * planes) % parts
    n0 = tl.program_id(0) // 2 % planes * BLOCK_N
    group = part * HEADS // (H // G)
    first, live = place_of(chunk, table_ptr, T, PER_SEQUENCE, Q, PACKED)
    if tl.program_id(0) % 2 == 0:
        _side(dy_ptr, C_ptr, B_ptr, s_ptr, r_ptr, S_ptr, R_ptr, K_ptr, dC_ptr, read_ptr, flow_ptr,
              chunk, part, group, n0, first, live, rows, COUNT, dy_stride, C_stride, B_stride,
              H, G, N, P, Q, BLOCK_N, HEADS, FINER, False)  # fmt: skip
    else:
        _side(x_ptr, B_ptr, C_ptr, s_ptr, r_ptr, R_ptr, R_ptr, K_ptr, dB_ptr, kept_ptr, flow_ptr,
              chunk, part, group, n0, first, live, rows, COUNT, x_stride, B_stride, C_stride,
              H, G, N, P, Q, BLOCK_N, HEADS, FINER, True)  # fmt: skip


def keys(
    chunks: Chunks, x: Tensor, dy: Tensor, B: Tensor, C: Tensor, s: Tensor, r: Tensor, S: Tensor, R: Tensor, K: Tensor,
    options: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dB and dC [B,T,G,N] in their dtype, read and kept [planes,H,count,Q], flow [planes,H,count]; see the kernel."""
    (batch, tokens, heads, channels), (groups, modes) = x.shape, B.shape[2:]
    finest = heads // K.shape[1]
    share = max(finest, math.gcd(options["HEADS"], heads // groups))
    parts = heads // groups // share
    dtype = B.dtype if parts == 1 else torch.float32
    dB, dC = (torch.empty(parts, batch, tokens, groups, modes, dtype=dtype, device=x.device) for _ in range(2))
    block_n = min(options["BLOCK_N"], modes)
    planes = modes // block_n
    read, kept = (chunks.per_token(planes * heads).unflatten(0, (planes, heads)) for _ in range(2))
    flow = torch.empty(planes, heads, chunks.count, dtype=torch.float32, device=x.device)
    (x, x_stride), (dy, dy_stride), (B, B_stride), (C, C_stride) = (token_rows(part) for part in (x, dy, B, C))
    keys_kernel[(2 * chunks.count * (heads // share) * planes,)](
        x, dy, B, C, s, r, S, R, K, dB, dC, read, kept, flow, chunks.table,
        chunks.tokens, chunks.per_sequence, chunks.count, batch * tokens, x_stride, dy_stride, B_stride, C_stride,
        H=heads, G=groups, N=modes, P=channels, Q=chunks.size,
        BLOCK_N=block_n, HEADS=share, FINER=share // finest, PACKED=chunks.packed,
        num_warps=options["num_warps"], num_stages=options["num_stages"],
    )  # fmt: skip
    dB, dC = (part[0] if parts == 1 else part.sum(0).to(B.dtype) for part in (dB, dC))
    return dB, dC, read, kept, flow

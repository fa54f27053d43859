"""Products of pairs of tokens of one chunk, summed over heads: what dB and dC have of their own chunk."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.primitives import dot
from zoo.ops.semiseparable.kernels.chunks import Chunks, place_of, tile, token_rows


@triton.jit(do_not_specialize=["T", "PER_SEQUENCE", "COUNT"])
def pairs_kernel(
    x_ptr, dy_ptr, B_ptr, C_ptr, s_ptr, r_ptr, K_ptr, row_ptr, col_ptr, skip_ptr, table_ptr,
    T, PER_SEQUENCE, COUNT, x_stride, dy_stride, B_stride, C_stride,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, SUB: tl.constexpr,
    HEADS: tl.constexpr, HAS_D: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """K_ij = sum over HEADS heads of 2^(s_i-r_j) <dy_i,x_j>, i >= j, in tiles of SUB tokens; one program owns a tile.

    K: float32 [count,H/HEADS,Q,Q], 0 above the diagonal. row, col [Q/SUB,H,count,Q]: sums over the tile's j of
    K_ij <C_i,B_j>, and over its i of the same without dt_j, of each head; both of the very same numbers, because they
    cancel later. Plane 0 holds the tiles on the diagonal, plane 1 the one below, which has later i and earlier j.
    skip [H,count,Q]: <dy_t,x_t>, if HAS_D.
    """
    tiles: tl.constexpr = (Q // SUB) * (Q // SUB + 1) // 2
    parts: tl.constexpr = H // HEADS
    chunk = tl.program_id(0) // (parts * tiles)
    part = tl.program_id(0) // tiles % parts
    place = tl.program_id(0) % tiles  # (0,0), (1,0), (1,1)
    down = tl.where(place > 0, 1, 0)
    across = tl.where(place > 1, 1, 0)
    h0 = part * HEADS
    i = down * SUB + tl.arange(0, SUB)
    j = across * SUB + tl.arange(0, SUB)
    first, live = place_of(chunk, table_ptr, T, PER_SEQUENCE, Q, PACKED)
    C = tile(C_ptr, first, live, C_stride, h0 // (H // G) * N, i, N)
    B = tile(B_ptr, first, live, B_stride, h0 // (H // G) * N, j, N)
    scores = dot(C, tl.trans(B))
    seen = i[:, None] >= j[None, :]
    K = tl.zeros([SUB, SUB], tl.float32)
    plane = (down - across).to(tl.int64) * H * COUNT * Q
    for k in range(0, HEADS):
        h = h0 + k
        dy = tile(dy_ptr, first, live, dy_stride, h * P, i, P)
        x = tile(x_ptr, first, live, x_stride, h * P, j, P)
        sums = (h.to(tl.int64) * COUNT + chunk) * Q
        s = tl.load(s_ptr + sums + i)
        before = tl.load(s_ptr + sums + j)
        step = tl.exp2(before - tl.load(r_ptr + sums + j))
        w = tl.exp2(tl.where(seen, s[:, None] - before[None, :], float("-inf")))
        pairs = dot(dy, tl.trans(x))
        if HAS_D:
            same = tl.sum(tl.where(i[:, None] == j[None, :], pairs, 0.0), 1)
            tl.store(skip_ptr + sums + i, same, mask=i < tl.where(down == across, Q, 0))
        pairs *= w
        tl.store(col_ptr + plane + sums + j, tl.sum(pairs * scores, 0))
        pairs *= step[None, :]
        tl.store(row_ptr + plane + sums + i, tl.sum(pairs * scores, 1))
        K += pairs
    corner = K_ptr + (chunk.to(tl.int64) * parts + part) * Q * Q
    tl.store(corner + i[:, None] * Q + j[None, :], K)
    if Q > SUB:  # the tile above the diagonal
        zeros = tl.zeros([SUB, SUB], tl.float32)
        above = i[:, None] < tl.where(place == 0, SUB, 0)
        tl.store(corner + i[:, None] * Q + SUB + j[None, :], zeros, mask=above)


def pairs(
    chunks: Chunks, x: Tensor, dy: Tensor, B: Tensor, C: Tensor, s: Tensor, r: Tensor, has_skip: bool,
    options: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """K [count,parts,Q,Q], row and col [Q/SUB,H,count,Q], skip [H,count,Q], float32; see the kernel."""
    (heads, channels), (groups, modes), size = x.shape[2:], B.shape[2:], chunks.size
    share, sub = math.gcd(options["HEADS"], heads // groups), min(64, size)
    tiles = (size // sub) * (size // sub + 1) // 2
    K = torch.empty(chunks.count, heads // share, size, size, dtype=torch.float32, device=x.device)
    row, col = (torch.empty(size // sub, heads, chunks.count, size, device=x.device) for _ in range(2))
    skip = chunks.per_token(heads)
    (x, x_stride), (dy, dy_stride), (B, B_stride), (C, C_stride) = (token_rows(part) for part in (x, dy, B, C))
    pairs_kernel[(chunks.count * (heads // share) * tiles,)](
        x, dy, B, C, s, r, K, row, col, skip, chunks.table,
        chunks.tokens, chunks.per_sequence, chunks.count, x_stride, dy_stride, B_stride, C_stride,
        H=heads, G=groups, N=modes, P=channels, Q=size, SUB=sub, HEADS=share, HAS_D=has_skip,
        PACKED=chunks.packed,
        num_warps=options["num_warps"], num_stages=options["num_stages"],
    )  # fmt: skip
    return K, row, col, skip

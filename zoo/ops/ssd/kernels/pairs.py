"""Products of pairs of tokens of one chunk, summed over heads: what dB and dC have of their own chunk."""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import dot
from zoo.ops.semiseparable.kernels.chunks import Chunks, place_of, tile, token_rows


@launched(do_not_specialize=["T", "PER_SEQUENCE", "COUNT"])
def pairs_kernel(
    x_ptr, dy_ptr, B_ptr, C_ptr, s_ptr, r_ptr, K_ptr, row_ptr, col_ptr, skip_ptr, table_ptr,
    T, PER_SEQUENCE, COUNT, x_stride, dy_stride, B_stride, C_stride,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, HEADS: tl.constexpr, HAS_D: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """K_ij = sum over HEADS heads of 2^(s_i-r_j) <dy_i,x_j>, i >= j; one program owns a tile of BLOCK_I by BLOCK_J.

    K: float32 [count,H/HEADS,Q,Q], undefined above the diagonal. row [Q/BLOCK_J,H,count,Q], col [Q/BLOCK_I,H,count,Q]:
    sums over j and over i of K_ij <C_i,B_j> in the tile, of each head; both of the very same numbers, because they
    cancel later. A plane for each place of the tile across or down; those above the diagonal are left undefined.
    skip [H,count,Q]: <dy_t,x_t>, if HAS_D. Time steps are below 2^64, and r is finite.
    """
    finer: tl.constexpr = BLOCK_I // BLOCK_J
    tiles: tl.constexpr = (Q // BLOCK_I) * (Q // BLOCK_I + 1) // 2 * finer
    parts: tl.constexpr = H // HEADS
    chunk = tl.program_id(0) // (parts * tiles)
    part = tl.program_id(0) // tiles % parts
    place = tl.program_id(0) % tiles  # rows of tiles from the top, each up to the diagonal
    down = place * 0
    for d in tl.static_range(1, Q // BLOCK_I):
        down += tl.where(place >= d * (d + 1) // 2 * finer, 1, 0)
    across = place - down * (down + 1) // 2 * finer
    h0 = part * HEADS
    i = down * BLOCK_I + tl.arange(0, BLOCK_I)
    j = across * BLOCK_J + tl.arange(0, BLOCK_J)
    first, live = place_of(chunk, table_ptr, T, PER_SEQUENCE, Q, PACKED)
    C = tile(C_ptr, first, live, C_stride, h0 // (H // G) * N, i, N)
    B = tile(B_ptr, first, live, B_stride, h0 // (H // G) * N, j, N)
    scores = tl.where(i[:, None] >= j[None, :], dot(C, tl.trans(B)), 0.0)
    K = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    plane = tl.full([1], H, tl.int64) * COUNT * Q
    rows = row_ptr + across * plane + i
    cols = col_ptr + down * plane + j
    own = tl.where(i // BLOCK_J == across, Q, 0)
    sums = (h0.to(tl.int64) * COUNT + chunk) * Q
    s = tl.load(s_ptr + sums + i)
    r = tl.load(r_ptr + sums + j)
    for k in range(0, HEADS):
        h = h0 + k
        dy = tile(dy_ptr, first, live, dy_stride, h * P, i, P)
        x = tile(x_ptr, first, live, x_stride, h * P, j, P)
        sums = (h.to(tl.int64) * COUNT + chunk) * Q
        later = (tl.minimum(h + 1, H - 1).to(tl.int64) * COUNT + chunk) * Q  # the compiler fetches only tiles ahead
        s_later = tl.load(s_ptr + later + i)
        r_later = tl.load(r_ptr + later + j)
        pairs = dot(dy, tl.trans(x))
        if HAS_D:
            same = tl.sum(tl.where(i[:, None] == j[None, :], pairs, 0.0), 1)
            tl.store(skip_ptr + sums + i, same, mask=i < own)
        # finite above the diagonal, where the scores are 0
        pairs *= tl.exp2(tl.minimum(s[:, None] - r[None, :], 64.0))
        K += pairs
        pairs *= scores
        tl.store(rows + sums, tl.sum(pairs, 1))
        tl.store(cols + sums, tl.sum(pairs, 0))
        s = s_later
        r = r_later
    corner = K_ptr + (chunk.to(tl.int64) * parts + part) * Q * Q
    tl.store(corner + i[:, None] * Q + j[None, :], K)


def pairs(
    chunks: Chunks, x: Tensor, dy: Tensor, B: Tensor, C: Tensor, s: Tensor, r: Tensor, has_skip: bool,
    options: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """K [count,parts,Q,Q], row and col [planes,H,count,Q], skip [H,count,Q], float32; see the kernel."""
    (heads, channels), (groups, modes), size = x.shape[2:], B.shape[2:], chunks.size
    share = math.gcd(options["HEADS"], heads // groups)
    block_i, block_j = min(options["BLOCK_I"], size), min(options["BLOCK_J"], size)
    down, finer = size // block_i, block_i // block_j
    K = torch.empty(chunks.count, heads // share, size, size, dtype=torch.float32, device=x.device)
    row, col = (torch.empty(n, heads, chunks.count, size, device=x.device) for n in (down * finer, down))
    skip = chunks.per_token(heads)
    (x, x_stride), (dy, dy_stride), (B, B_stride), (C, C_stride) = (token_rows(part) for part in (x, dy, B, C))
    pairs_kernel[(chunks.count * (heads // share) * (down * (down + 1) // 2 * finer),)](
        x, dy, B, C, s, r, K, row, col, skip, chunks.table,
        chunks.tokens, chunks.per_sequence, chunks.count, x_stride, dy_stride, B_stride, C_stride,
        H=heads, G=groups, N=modes, P=channels, Q=size, BLOCK_I=block_i, BLOCK_J=block_j, HEADS=share,
        HAS_D=has_skip, PACKED=chunks.packed,
        num_warps=options["num_warps"], num_stages=options["num_stages"],
    )  # fmt: skip
    return K, row, col, skip

"""Projection along the length, E k: a long sum with a small result, split over programs and added up afterwards."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import add_product
from zoo.ops.kernels.rows import cdiv
from zoo.ops.kernels.widths import cut_width
from zoo.ops.linformer_attention.kernels.tiles import project_tiles, split_length
from zoo.ops.softmax_attention.kernels.tiles import wide_rows


@launched
def _project_part(
    matrix_ptr, x_ptr, spans_ptr, part_ptr,  # [units,R,T] [B,T,G,P] [B,2] -> [parts,B,R,G P], float32
    B, T, R, N, G, span, units, r_tiles, n_tiles,  # N: channels of a unit, all G P, or P if each head has a matrix
    matrix_stride_u, matrix_stride_r, matrix_stride_t, x_stride_b, x_stride_t, x_stride_g,
    P: tl.constexpr, HAS_SPANS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program owns a [BLOCK_R,BLOCK_N] tile of one unit of one row, summed over `span` tokens."""
    program = tl.program_id(0)
    n_tile = program % n_tiles
    r_tile = (program // n_tiles) % r_tiles
    rest = program // (n_tiles * r_tiles)
    unit = rest % units
    b = ((rest // units) % B).to(tl.int64)
    part = (rest // (units * B)).to(tl.int64)

    r = (r_tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_r, in_n = r < R, n < N
    group = (unit + n // P).to(tl.int64)
    first, length = b * 0, b * 0 + T
    if HAS_SPANS:
        first, length = tl.load(spans_ptr + b * 2), tl.load(spans_ptr + b * 2 + 1)
    start = part * span
    stop = tl.minimum(start + span, length)
    matrix_at = matrix_ptr + unit.to(tl.int64) * matrix_stride_u + r[:, None] * matrix_stride_r
    x_at = x_ptr + b * x_stride_b + (group * x_stride_g + n % P)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    lost = total
    for at in range(start, stop, BLOCK_T):
        t = at + tl.arange(0, BLOCK_T)  # int64
        in_t = t < stop
        matrix = tl.load(
            matrix_at + t[None, :] * matrix_stride_t, mask=in_r[:, None] & in_t[None, :], other=0.0
        )  # [BLOCK_R, BLOCK_T]
        x = tl.load(
            x_at + (first + t)[:, None] * x_stride_t, mask=in_t[:, None] & in_n[None, :], other=0.0
        )  # [BLOCK_T, BLOCK_N]
        total, lost = add_product(total, lost, matrix, x)
    at_part = part_ptr + ((part * B + b) * R + r[:, None]) * (G * P) + (unit * P + n)[None, :]
    tl.store(at_part, total, mask=in_r[:, None] & in_n[None, :])


def project(matrix: Tensor, x: Tensor, spans: Tensor | None) -> Tensor:
    """matrix [R,T] or [G,R,T], any strides, x [B,T,G,P] -> [B,R,G,P], contiguous, in the dtype of x.

    spans: int64 [B,2], first real token and number of real tokens of each row; None if all are real. Column t of the
    matrix meets the t-th real token.
    """
    wanted, x = x.shape[3], wide_rows(x)
    batch, tokens, groups, width = x.shape
    rank, units = matrix.shape[-2], 1 if matrix.dim() == 2 else groups
    channels = groups * width // units
    tiles = project_tiles(rank, channels, x.element_size())
    r_tiles, n_tiles = cdiv(rank, tiles["BLOCK_R"]), cdiv(channels, tiles["BLOCK_N"])
    programs = batch * units * r_tiles * n_tiles
    parts, span = split_length(tokens, programs, tiles["BLOCK_T"])
    partial = torch.empty((parts, batch, rank, groups, width), dtype=torch.float32, device=x.device)
    _project_part[(parts * programs,)](
        matrix, x, x if spans is None else spans, partial,
        batch, tokens, rank, channels, groups, span, units, r_tiles, n_tiles,
        0 if units == 1 else matrix.stride(0), matrix.stride(-2), matrix.stride(-1),
        x.stride(0), x.stride(1), x.stride(2),
        P=width, HAS_SPANS=spans is not None, **tiles,
    )  # fmt: skip
    return cut_width((partial[0] if parts == 1 else partial.sum(0)).to(x.dtype), wanted)

"""Launches the kernels of the diagonal scan with block sizes that follow from sizes and dtype; nothing is searched.

The kernels read tokens along the last axis, [D, B T]: one channel's tokens are an operand of its matrix products. The
one transposed copy of x, and of the gradients, is made here. A kernel ahead is the transpose of a kernel behind: its
forward is the other's backward in x, and the other way round; both directions add up in float32.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from zoo.ops.long_convolution.kernels.gates import time_first, time_last
from zoo.ops.lti.kernels.gradients import shared_gradient_kernel
from zoo.ops.lti.kernels.mixing import mix_kernel
from zoo.ops.lti.kernels.states import added_kernel, carry_kernel
from zoo.ops.lti.kernels.tables import table_kernel
from zoo.ops.lti.modes import times
from zoo.ops.semiseparable.kernels.launch import OPERANDS, on_device

SEGMENTS = (64, 1024)  # tokens of a row, at least and at most
CARRIED = 256  # modes of a program that walks over the rows of a sequence
WARPS = 8  # with 4, tiles of 64 by 64 spill registers on Hopper


@dataclass(frozen=True)
class Rows:
    """How tokens lie in rows of at most `segment`, each in one sequence.

    start: int64 [rows], first token of a row, counted over the flattened batch; length: int32 [rows].
    first, count, tail: of each sequence its first row (int64 [S]), its rows and the tokens of the last (int32 [S]).
    """

    segment: int
    start: Tensor
    length: Tensor
    first: Tensor
    count: Tensor
    tail: Tensor


@dataclass(frozen=True)
class Tables:
    """What a channel's chunks share. powers: [D,2,M,K+1]; taps: [D,K]; step: [D,4,M]; weights: c [D,M,2], float32.

    log_a, c: [D,M,2] in float64.
    """

    powers: Tensor
    taps: Tensor
    step: Tensor
    weights: Tensor
    log_a: Tensor
    c: Tensor


def tile_sizes(dtype: torch.dtype, block_m: int) -> tuple[int, int]:
    """Tokens of a chunk and rows of a program.

    IEEE float32 products run without tensor cores and hold operands in registers. Half precision takes the 64 rows of a
    warp group's product even where few are filled: with fewer, every warp would hold all tables in registers. 128 modes
    with chunks of 64 would not fit in shared memory.
    """
    if dtype == torch.float32:
        return 32, 32 if block_m <= 32 else 16
    return 64 if block_m <= 64 else 32, 64


def segment_length(tokens: int, chunk: int) -> int:
    """Tokens of a row: enough rows that a product has 64 of them, and chunks enough that states are few."""
    shortest, longest = SEGMENTS
    balanced: int = triton.next_power_of_2(triton.cdiv(tokens, 64))
    return max(2 * chunk, shortest, min(longest, balanced))


def rows_of(x: Tensor, cu_seqlens: Tensor | None, chunk: int) -> Rows:
    """Rows of x [B,T,D]. Shapes follow from sizes alone; slots without a token have length 0."""
    batch, tokens, device = x.shape[0], x.shape[1], x.device
    segment = segment_length(batch * tokens, chunk)
    if cu_seqlens is None:
        per = triton.cdiv(tokens, segment)
        begin = torch.arange(per, device=device) * segment
        row = torch.arange(batch, device=device)
        start = (row[:, None] * tokens + begin).flatten()
        length = (tokens - begin).clamp(max=segment).to(torch.int32).repeat(batch)
        count = torch.full((batch,), per, dtype=torch.int32, device=device)
        return Rows(segment, start, length, row * per, count, torch.full_like(count, tokens - (per - 1) * segment))
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    first = bounds[:-1] // segment + torch.arange(lengths.numel(), device=device)
    slot = torch.arange(tokens // segment + lengths.numel(), device=device)
    owner = torch.searchsorted(first, slot, right=True) - 1
    start = bounds[owner] + (slot - first[owner]) * segment
    length = (bounds[owner + 1] - start).clamp(0, segment).to(torch.int32)
    count = (lengths + segment - 1) // segment
    tail = lengths - (count - 1).clamp(min=0) * segment
    return Rows(segment, start, length, first, count.to(torch.int32), tail.to(torch.int32))


class Launch:
    """One call: its tables, its rows, and the kernels over them."""

    def __init__(self, x: Tensor, log_a: Tensor, c: Tensor, D: Tensor | None, cu_seqlens: Tensor | None) -> None:
        """x: [B,T,D]. log_a, c: [D,M,2]. D: [D] or None."""
        self.channels, self.modes = log_a.shape[:2]
        block_m = max(16, triton.next_power_of_2(self.modes))
        chunk, self.row_tile = tile_sizes(x.dtype, block_m)
        self.rows = rows_of(x, cu_seqlens, chunk)
        self.count = self.rows.start.numel()
        self.blocks: dict[str, Any] = {
            "D": self.channels, "M": self.modes, "LAG": 0, "CHUNK": chunk, "ROWS": self.row_tile,
            "BLOCK_M": block_m, "OPERAND": OPERANDS[x.dtype], "num_warps": WARPS, "num_stages": 2,
        }  # fmt: skip
        self.tables = self._tables(log_a, c, D)

    def with_kernel(self, log_a: Tensor, c: Tensor, lag: int) -> Launch:
        """The same rows under another kernel without a skip. lag: 0, or 1 if its tap 0 meets the token next door."""
        other = copy.copy(self)
        other.blocks = self.blocks | {"LAG": lag}
        other.tables = other._tables(log_a, c, None)
        return other

    def _tables(self, log_a: Tensor, c: Tensor, D: Tensor | None) -> Tables:
        chunk, lag, block_m = (self.blocks[name] for name in ("CHUNK", "LAG", "BLOCK_M"))
        log_a, c = log_a.double().contiguous(), c.double().contiguous()
        skip = None if D is None else D.double().contiguous()
        channels, modes = self.channels, self.modes
        powers = self.scratch(channels, 2, modes, chunk + 1)
        taps, step = self.scratch(channels, chunk), self.scratch(channels, 4, modes)
        with on_device(log_a):
            table_kernel[(channels,)](
                log_a, c, skip, powers, taps, step,
                M=modes, LAG=lag, HAS_SKIP=D is not None, CHUNK=chunk, BLOCK_M=block_m, num_warps=WARPS,
            )  # fmt: skip
        return Tables(powers, taps, step, c.float(), log_a, c)

    def scratch(self, *shape: int) -> Tensor:
        """Uninitialised float32."""
        return torch.empty(shape, dtype=torch.float32, device=self.rows.start.device)

    @property
    def grid(self) -> tuple[int]:
        return (triton.cdiv(self.count, self.row_tile) * self.channels,)

    def row_states(
        self, x_t: Tensor, first: Tensor | None, *, reverse: bool, weighted: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """State before each row [rows,2,D,M] (gradient of the one after it, in reverse) and the last [S,2,D,M].

        x_t: tokens [D,BT], or gradients of outputs in reverse. first: initial states [S,2,D,M] (gradients of the final
        ones), or None. weighted: the derivatives of both in log_a besides; empty tensors if not.
        Returns (states, their derivatives, last, its derivative).
        """
        per_row = (self.count, 2, self.channels, self.modes)
        per_sequence = (self.rows.count.numel(), *per_row[1:])
        added, states, last = self.scratch(*per_row), self.scratch(*per_row), self.scratch(*per_sequence)
        weights = self.scratch(*per_row) if weighted else self.scratch(0)
        slopes = self.scratch(*per_row) if weighted else self.scratch(0)
        last_slope = self.scratch(*per_sequence) if weighted else self.scratch(0)
        tables, rows = self.tables, self.rows
        total = self.channels * self.modes
        with on_device(x_t):
            added_kernel[self.grid](
                x_t, tables.powers, tables.weights, tables.step, rows.start, rows.length, added, weights,
                self.count, *x_t.stride(), REVERSE=reverse, WEIGHTED=weighted, **self.blocks,
            )  # fmt: skip
            carry_kernel[(per_sequence[0], triton.cdiv(total, CARRIED))](
                added, weights, first, tables.log_a, rows.first, rows.count, rows.tail,
                states, slopes, last, last_slope, total, rows.segment,
                HAS_FIRST=first is not None, WEIGHTED=weighted, REVERSE=reverse, BLOCK=CARRIED, num_warps=4,
            )  # fmt: skip
        return states, slopes, last, last_slope

    def mix(
        self,
        x_t: Tensor,
        states: Tensor,
        *,
        reverse: bool,
        dtype: torch.dtype | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        """Outputs [D,BT] of tokens [D,BT], or gradients of tokens of gradients of outputs.

        dtype: of the result; None for that of x_t. onto: float32 [D,BT] to add the result to, in place, or None.
        """
        y_t = torch.empty_like(x_t, dtype=dtype) if onto is None else onto
        tables, rows = self.tables, self.rows
        with on_device(x_t):
            mix_kernel[self.grid](
                x_t, tables.powers, tables.weights, tables.taps, tables.step, rows.start, rows.length, states, y_t,
                self.count, *x_t.stride(), *y_t.stride(), REVERSE=reverse, ONTO=onto is not None, **self.blocks,
            )  # fmt: skip
        return y_t

    def shared_gradients(self, x_t: Tensor, dy_t: Tensor, states: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the taps [D,K], and the sums [4,D,M] that those of c and log_a between chunks are made of."""
        blocks = triton.cdiv(self.count, self.row_tile)
        dtaps = self.scratch(blocks, self.channels, self.blocks["CHUNK"])
        sums = self.scratch(blocks, 4, self.channels, self.modes)
        tables, rows = self.tables, self.rows
        with on_device(x_t):
            shared_gradient_kernel[self.grid](
                x_t, dy_t, tables.powers, tables.step, rows.start, rows.length, states, slopes, dtaps, sums,
                self.count, *x_t.stride(), *dy_t.stride(), **self.blocks,
            )  # fmt: skip
        return dtaps.double().sum(0), sums.double().sum(0)


def planes(state: Tensor | None) -> Tensor | None:
    """[S,D,M,2] -> [S,2,D,M], contiguous float32."""
    return None if state is None else state.movedim(3, 1).float().contiguous()


def pairs(state: Tensor) -> Tensor:
    """[S,2,D,M] -> [S,D,M,2], contiguous."""
    return state.movedim(1, 3).contiguous()


def forward(
    x: Tensor,
    log_a: Tensor,
    c: Tensor,
    D: Tensor | None,
    c_reverse: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse_lag: int,
) -> tuple[Tensor, Tensor]:
    """y [B,T,D] in the dtype of x and the final state [S,D,M,2] float32."""
    launch = Launch(x, log_a, c, D, cu_seqlens)
    x_t = time_last(x, None, x.dtype).flatten(1)
    states, _, last, _ = launch.row_states(x_t, planes(initial_state), reverse=False, weighted=False)
    y_t = launch.mix(x_t, states, reverse=False, dtype=None if c_reverse is None else torch.float32)
    if c_reverse is not None:
        ahead = launch.with_kernel(log_a, c_reverse, reverse_lag)
        coming, _, _, _ = ahead.row_states(x_t, None, reverse=True, weighted=False)
        ahead.mix(x_t, coming, reverse=True, onto=y_t)
    return time_first(y_t.unflatten(1, x.shape[:2]), None, x.dtype)[0], pairs(last)


def backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    log_a: Tensor,
    c: Tensor,
    D: Tensor | None,
    c_reverse: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse_lag: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_a, c, D, c_reverse and the initial state; empty tensors for those that are absent.

    The states before rows of up to 1,024 tokens are computed anew. Orders of summation are fixed, so gradients are the
    same in every run. To the kernel ahead, dy are tokens that its transpose scans, and x what it is compared with.
    """
    launch = Launch(x, log_a, c, D, cu_seqlens)
    dy_t, dlast = time_last(dy, None, x.dtype).flatten(1), planes(dfinal)
    leaving, _, dfirst, _ = launch.row_states(dy_t, dlast, reverse=True, weighted=False)
    dx_t = launch.mix(dy_t, leaving, reverse=True, dtype=None if c_reverse is None else torch.float32)
    del leaving
    x_t = time_last(x, None, x.dtype).flatten(1)
    dlog_a, dc_reverse = log_a.new_zeros((), dtype=torch.float64), x.new_empty(0)
    if c_reverse is not None:
        ahead = launch.with_kernel(log_a, c_reverse, reverse_lag)
        states, slopes, _, _ = ahead.row_states(dy_t, None, reverse=False, weighted=True)
        ahead.mix(dy_t, states, reverse=False, onto=dx_t)
        dtaps, sums = ahead.shared_gradients(dy_t, x_t, states, slopes)
        dlog_a, dc = _mode_gradients(ahead, dtaps[:, reverse_lag:], sums)
        dc_reverse = dc.to(c_reverse.dtype)
    dx = time_first(dx_t.unflatten(1, x.shape[:2]), None, x.dtype)[0]
    del dx_t
    states, slopes, _, last_slope = launch.row_states(x_t, planes(initial_state), reverse=False, weighted=True)
    dtaps, sums = launch.shared_gradients(x_t, dy_t, states, slopes)
    inside, dc = _mode_gradients(launch, dtaps, sums)
    assert dlast is not None
    g_re, g_im, w_re, w_im = (part.double() for both in (dlast, last_slope) for part in both.unbind(1))
    after = torch.stack([g_re * w_re + g_im * w_im, g_im * w_re - g_re * w_im], -1).sum(0)
    dlog_a = (dlog_a + inside + after).to(log_a.dtype)
    dskip = dtaps[:, 0].to(D.dtype) if D is not None else x.new_empty(0)
    dinitial = pairs(dfirst).to(initial_state.dtype) if initial_state is not None else x.new_empty(0)
    return dx, dlog_a, dc.to(c.dtype), dskip, dc_reverse, dinitial


def _mode_gradients(launch: Launch, dkernel: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of log_a and c [D,M,2], float64, from that of a chunk's lags [D,K] and the sums between chunks."""
    tables = launch.tables
    lags = torch.arange(dkernel.shape[1], device=dkernel.device, dtype=torch.float64)
    inside = torch.ops.zoo.lti_moments(tables.log_a, torch.stack([dkernel, dkernel * lags]), torch.float64)
    seen_re, seen_im = inside[0, ..., 0] + sums[0], inside[0, ..., 1] + sums[1]
    slope = (inside[1, ..., 0] + sums[2], inside[1, ..., 1] + sums[3])
    slope_re, slope_im = times((tables.c[..., 0], tables.c[..., 1]), slope)
    return 2.0 * torch.stack([slope_re, -slope_im], -1), 2.0 * torch.stack([seen_re, -seen_im], -1)

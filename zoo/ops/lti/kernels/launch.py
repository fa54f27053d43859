"""Launches the kernels of the diagonal scan with block sizes that follow from sizes and dtype; nothing is searched.

The kernels of this file read tokens along the last axis, [D, B T]: one channel's tokens are an operand of its matrix
products, and the one transposed copy of x, and of the gradients, is made here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.long_convolution.kernels.gates import time_first, time_last
from zoo.ops.lti.kernels.gradients import shared_gradient_kernel
from zoo.ops.lti.kernels.mixing import mix_kernel
from zoo.ops.lti.kernels.states import added_kernel, carry_kernel
from zoo.ops.lti.kernels.tables import mode_gradient_kernel, table_kernel
from zoo.ops.semiseparable.kernels.launch import OPERANDS

SEGMENTS = (64, 1024)  # tokens of a row, at least and at most
CARRIED = 256  # modes of a program that walks over the rows of a sequence
STAGES = 3  # of the loop over chunks
TABLE_WARPS = {64: 8, 32: 4}  # by tokens of a chunk
FINE = 8  # powers of a mode multiplied with each coarse one
WARPS = 8  # with 4, tiles of 64 by 64 spill registers on Hopper


@dataclass(frozen=True)
class Rows:
    """How tokens lie in rows of at most `segment`, each in one sequence.

    count: rows; sequences: S. tokens: of each sequence, which says all where none is packed; there the rest is None.
    start: int64 [rows], first token of a row, counted over the flattened batch; length: int32 [rows].
    first, each, tail: of each sequence its first row (int64 [S]), its rows and the tokens of the last (int32 [S]).
    """

    segment: int
    count: int
    sequences: int
    tokens: int
    start: Tensor | None = None
    length: Tensor | None = None
    first: Tensor | None = None
    each: Tensor | None = None
    tail: Tensor | None = None


@dataclass(frozen=True)
class Tables:
    """What a channel's chunks share. powers: [D,2,K+1,M]; taps: [D,K]; step: [D,4,M], float32. log_a, c: [D,M,2]."""

    powers: Tensor
    taps: Tensor
    step: Tensor
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
    balanced: int = next_power_of_2(cdiv(tokens, 64))
    return max(2 * chunk, shortest, min(longest, balanced))


def rows_of(x: Tensor, cu_seqlens: Tensor | None, segment: int) -> Rows:
    """Rows of x [B,T,D]. Shapes follow from sizes alone; slots without a token have length 0."""
    batch, tokens, device = x.shape[0], x.shape[1], x.device
    if cu_seqlens is None:
        return Rows(segment, batch * cdiv(tokens, segment), batch, tokens)
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    first = bounds[:-1] // segment + torch.arange(lengths.numel(), device=device)
    slot = torch.arange(tokens // segment + lengths.numel(), device=device)
    owner = torch.searchsorted(first, slot, right=True) - 1
    start = bounds[owner] + (slot - first[owner]) * segment
    length = (bounds[owner + 1] - start).clamp(0, segment).to(torch.int32)
    each = (lengths + segment - 1) // segment
    tail = lengths - (each - 1).clamp(min=0) * segment
    packed = (start, length, first, each.to(torch.int32), tail.to(torch.int32))
    return Rows(segment, slot.numel(), lengths.numel(), tokens, *packed)


@dataclass(frozen=True)
class ModeGradients:
    """Where gradients of log_a, c [D,M,2] and the skip [D] go, contiguous."""

    log_a: Tensor
    c: Tensor
    skip: Tensor | None


class Launch:
    """One call: its tables, its rows, and the kernels over them."""

    def __init__(self, x: Tensor, log_a: Tensor, c: Tensor, D: Tensor | None, cu_seqlens: Tensor | None) -> None:
        """x: [B,T,D]. log_a, c: [D,M,2]. D: [D] or None."""
        self.channels, self.modes = log_a.shape[:2]
        block_m = max(16, next_power_of_2(self.modes))
        chunk, segment, own = self._sizes(x, block_m, cu_seqlens is not None)
        self.rows = rows_of(x, cu_seqlens, segment)
        self.device = x.device
        self.count = self.rows.count
        self.blocks: dict[str, Any] = {
            "D": self.channels, "M": self.modes, "LAG": 0, "CHUNK": chunk, "BLOCK_M": block_m,
            "OPERAND": OPERANDS[x.dtype], "SEGMENT": segment, "PACKED": cu_seqlens is not None, **own,
        }  # fmt: skip
        self.tables = self._tables(log_a, c, D)

    def _sizes(self, x: Tensor, block_m: int, packed: bool) -> tuple[int, int, dict[str, Any]]:
        """Tokens of a chunk, tokens of a row, and the other blocks of these kernels."""
        chunk, rows = tile_sizes(x.dtype, block_m)
        own = {"WHOLE": not packed and x.shape[1] % chunk == 0, "ROWS": rows, "num_warps": WARPS, "num_stages": STAGES}
        return chunk, segment_length(x.shape[0] * x.shape[1], chunk), own

    def read(self, x: Tensor) -> Tensor:
        """x [B,T,D] as the kernels read it."""
        return time_last(x, None, x.dtype).flatten(1)

    def written(self, y_t: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """What the kernels have made of tokens, as [B,T,D] of `dtype`."""
        return time_first(y_t.unflatten(1, shape[:2]), None, dtype)[0]

    def with_kernel(self, log_a: Tensor, c: Tensor, lag: int) -> Launch:
        """The same rows under another kernel without a skip. lag: 0, or 1 if its tap 0 meets the token next door."""
        other = copy.copy(self)
        other.blocks = self.blocks | {"LAG": lag}
        other.tables = other._tables(log_a, c, None)
        return other

    def _tables(self, log_a: Tensor, c: Tensor, D: Tensor | None) -> Tables:
        chunk, lag, block_m = (self.blocks[name] for name in ("CHUNK", "LAG", "BLOCK_M"))
        log_a, c = log_a.contiguous(), c.contiguous()
        skip = None if D is None else D.contiguous()
        channels, modes = self.channels, self.modes
        powers = self.scratch(channels, 2, chunk + 1, modes)
        taps, step = self.scratch(channels, chunk), self.scratch(channels, 4, modes)
        with on_device(log_a):
            table_kernel[(channels,)](
                log_a, c, skip, powers, taps, step,
                M=modes, LAG=lag, HAS_SKIP=D is not None, CHUNK=chunk, FINE=FINE, BLOCK_M=block_m,
                num_warps=TABLE_WARPS[chunk],
            )  # fmt: skip
        return Tables(powers, taps, step, log_a, c)

    def scratch(self, *shape: int) -> Tensor:
        """Uninitialised float32."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    @property
    def grid(self) -> tuple[int]:
        return (cdiv(self.count, self.blocks["ROWS"]) * self.channels,)

    def row_states(
        self, x_t: Tensor, first: Tensor | None, *, reverse: bool, weighted: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """State before each row [rows,2,D,M] (gradient of the one after it, in reverse) and the last [S,2,D,M].

        x_t: tokens [D,BT], or gradients of outputs in reverse. first: initial states [S,2,D,M] (gradients of the final
        ones), or None. weighted: the derivatives of both in log_a besides; empty tensors if not.
        Returns (states, their derivatives, last, its derivative).
        """
        per_row = (self.count, 2, self.channels, self.modes)
        per_sequence = (self.rows.sequences, *per_row[1:])
        added, states, last = self.scratch(*per_row), self.scratch(*per_row), self.scratch(*per_sequence)
        weights = self.scratch(*per_row) if weighted else self.scratch(0)
        slopes = self.scratch(*per_row) if weighted else self.scratch(0)
        last_slope = self.scratch(*per_sequence) if weighted else self.scratch(0)
        tables, rows = self.tables, self.rows
        total = self.channels * self.modes
        with on_device(x_t):
            self._add(x_t, added, weights, REVERSE=reverse, WEIGHTED=weighted)
            carry_kernel[(per_sequence[0] * cdiv(total, CARRIED),)](
                added, weights, first, tables.log_a, rows.first, rows.each, rows.tail,
                states, slopes, last, last_slope, total, rows.segment, rows.tokens,
                HAS_FIRST=first is not None, WEIGHTED=weighted, REVERSE=reverse,
                PACKED=self.blocks["PACKED"], BLOCK=CARRIED, num_warps=4,
            )  # fmt: skip
        return states, slopes, last, last_slope

    def _add(self, x_t: Tensor, added: Tensor, weights: Tensor, **kind: bool) -> None:
        tables, rows = self.tables, self.rows
        added_kernel[self.grid](
            x_t, tables.powers, tables.c, tables.step, rows.start, rows.length, added, weights,
            self.count, rows.tokens, *x_t.stride(), **kind, **self.blocks,
        )  # fmt: skip

    def mix(
        self,
        x_t: Tensor,
        states: Tensor,
        *,
        reverse: bool,
        dtype: torch.dtype | None = None,
        onto: Tensor | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """Outputs [D,BT] of tokens [D,BT], or gradients of tokens of gradients of outputs.

        dtype: of the result; None for that of x_t. onto: float32 [D,BT] to add the result to, in place, or None.
        in_place: the result replaces x_t, each chunk of which is read by the program that then writes it.
        """
        y_t = onto
        if y_t is None:
            y_t = x_t if in_place else torch.empty_like(x_t, dtype=dtype)
        tables, rows = self.tables, self.rows
        with on_device(x_t):
            mix_kernel[self.grid](
                x_t, tables.powers, tables.c, tables.taps, tables.step, rows.start, rows.length, states, y_t,
                self.count, rows.tokens, *x_t.stride(), *y_t.stride(), REVERSE=reverse,
                ONTO=onto is not None, **self.blocks,
            )  # fmt: skip
        return y_t

    def shared_gradients(self, x_t: Tensor, dy_t: Tensor, states: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the taps [blocks,D,K], and the sums [blocks,4,D,M] for those of c and log_a between chunks."""
        blocks = cdiv(self.count, self.blocks["ROWS"])
        dtaps = self.scratch(blocks, self.channels, self.blocks["CHUNK"])
        sums = self.scratch(blocks, 4, self.channels, self.modes)
        tables, rows = self.tables, self.rows
        with on_device(x_t):
            shared_gradient_kernel[self.grid](
                x_t, dy_t, tables.powers, tables.step, rows.start, rows.length, states, slopes, dtaps, sums,
                self.count, rows.tokens, *x_t.stride(), *dy_t.stride(), **self.blocks,
            )  # fmt: skip
        return dtaps, sums

    def mode_gradients(
        self,
        made: tuple[Tensor, Tensor],
        grads: ModeGradients,
        last: tuple[Tensor, Tensor] | None,
        other: Tensor | None,
    ) -> None:
        """Fill `grads` from the outcome of `shared_gradients`.

        last: gradient of the last states and their derivatives in log_a [S,2,D,M], or None. other: float64 [D,M,2] to
        be added to the gradient of log_a, or None.
        """
        dtaps, sums = made
        dlast, slope = (None, None) if last is None else last
        names = ("D", "M", "LAG", "CHUNK", "BLOCK_M")
        with on_device(dtaps):
            mode_gradient_kernel[(self.channels,)](
                self.tables.log_a, self.tables.c, dtaps, sums, dlast, slope, other,
                grads.log_a, grads.c, grads.skip, dtaps.shape[0], self.rows.sequences,
                HAS_LAST=last is not None, HAS_OTHER=other is not None, HAS_SKIP=grads.skip is not None, FINE=FINE,
                num_warps=TABLE_WARPS[self.blocks["CHUNK"]], **{name: self.blocks[name] for name in names},
            )  # fmt: skip


def planes(state: Tensor | None) -> Tensor | None:
    """[S,D,M,2] -> [S,2,D,M], contiguous float32."""
    return None if state is None else state.movedim(3, 1).float().contiguous()


def pairs(state: Tensor) -> Tensor:
    """[S,2,D,M] -> [S,D,M,2], contiguous."""
    return state.movedim(1, 3).contiguous()

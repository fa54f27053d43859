"""Launches the kernels that read tokens as they come. See wide.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.lti.kernels.launch import Launch
from zoo.ops.lti.kernels.wide import wide_added_kernel, wide_mix_kernel
from zoo.ops.lti.kernels.wide_gradients import wide_gradient_kernel

CHUNK = 32  # tokens; the tables of longer chunks would not fit beside each other
MOST_MODES = 32
SEGMENTS = (64, 2048)  # tokens of a row, at least and at most
PROGRAMS = 256  # to keep a large GPU busy, as far as short rows allow


@dataclass(frozen=True)
class Size:
    """A program's channels, one to a warp (8 are sixteen bytes of a token), its rows, and stages of its loop."""

    wide: int = 8
    rows: int = 16
    stages: int = 3
    registers: int | None = None  # at most, of a thread; None: as many as it takes


SIZES = {"added": Size(registers=128), "weighted": Size(), "mix": Size(), "gradient": Size()}


def wide_serves(dtype: torch.dtype, channels: int, modes: int) -> bool:
    """Whether these kernels serve: tables of wider numbers, or of more modes, would spill registers.

    Channels must come in whole sixteens, so that every token's begin at a multiple of 16 numbers.
    """
    return dtype == torch.bfloat16 and channels % 16 == 0 and modes <= MOST_MODES


def wide_segment(tokens: int, channels: int) -> int:
    """Tokens of a row: as many as leave PROGRAMS programs, so that tables are loaded and states passed on seldom."""
    shortest, longest = SEGMENTS
    size = SIZES["mix"]
    share = max(1, tokens * channels // (size.wide * size.rows * PROGRAMS))
    return max(shortest, min(longest, next_power_of_2(share + 1) // 2))


class WideLaunch(Launch):
    """Tokens stay [B T, D]. Results never take the place of what is read: that belongs to the caller."""

    def _sizes(self, x: Tensor, block_m: int, packed: bool) -> tuple[int, int, dict[str, Any]]:
        segment = wide_segment(x.shape[0] * x.shape[1], x.shape[2])
        return CHUNK, segment, {}

    def read(self, x: Tensor) -> Tensor:
        rows = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
        even = x.stride(2) == 1 and x.stride(1) % 16 == 0 and x.stride(1) > 0
        x = x if rows and even else x.contiguous()
        return x.flatten(0, 1)

    def written(self, y_t: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        y: Tensor = y_t.unflatten(0, shape[:2])
        return y

    def _blocks_of(self, kernel: str) -> tuple[int, dict[str, Any]]:
        """Programs that share the rows of the same channels, and the constants of a kernel."""
        size = SIZES[kernel]
        own = {"WIDE": size.wide, "ROWS": size.rows, "num_warps": size.wide, "num_stages": size.stages}
        if size.registers is not None:
            own["maxnreg"] = size.registers
        parts = max(1, min(cdiv(self.count, size.rows), PROGRAMS * 8 // self.channels))
        return parts, self.blocks | own

    def _add(self, x_t: Tensor, added: Tensor, weights: Tensor, **kind: bool) -> None:
        tables, rows = self.tables, self.rows
        parts, blocks = self._blocks_of("weighted" if kind["WEIGHTED"] else "added")
        wide_added_kernel[(parts * (self.channels // blocks["WIDE"]),)](
            x_t, tables.powers, tables.c, rows.start, rows.length, added, weights,
            self.count, rows.tokens, x_t.stride(0), **kind, **blocks,
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
        """As in `Launch`, but onto [BT,D] is left as it is, and the result has the dtype of x_t where one is given."""
        y_t = torch.empty(x_t.shape, dtype=dtype or x_t.dtype, device=x_t.device)
        tables, rows = self.tables, self.rows
        parts, blocks = self._blocks_of("mix")
        with on_device(x_t):
            wide_mix_kernel[(parts * (self.channels // blocks["WIDE"]),)](
                x_t, tables.powers, tables.c, tables.taps, rows.start, rows.length, states, y_t, onto,
                self.count, rows.tokens, x_t.stride(0), y_t.stride(0), REVERSE=reverse, ONTO=onto is not None, **blocks,
            )  # fmt: skip
        return y_t

    def shared_gradients(self, x_t: Tensor, dy_t: Tensor, states: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        parts, blocks = self._blocks_of("gradient")
        dtaps = self.scratch(parts, self.channels, CHUNK)
        sums = self.scratch(parts, 4, self.channels, self.modes)
        tables, rows = self.tables, self.rows
        with on_device(x_t):
            wide_gradient_kernel[(parts * (self.channels // blocks["WIDE"]),)](
                x_t, dy_t, tables.powers, rows.start, rows.length, states, slopes, dtaps, sums,
                self.count, rows.tokens, x_t.stride(0), dy_t.stride(0), **blocks,
            )  # fmt: skip
        return dtaps, sums

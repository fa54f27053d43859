"""Launches the forward kernels of the selective scan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.rows import cdiv
from zoo.ops.selective_scan import triton_path
from zoo.ops.selective_scan.kernels import tuning
from zoo.ops.selective_scan.kernels.carry import link_kernel, summary_kernel
from zoo.ops.selective_scan.kernels.forward import scan_kernel
from zoo.ops.selective_scan.kernels.tuning import Blocks, blocks_for, segment_length
from zoo.ops.semiseparable.kernels.launch import contiguous


@dataclass(frozen=True)
class Pieces:
    """Sequences cut into pieces of `size` tokens, `total` in all.

    each: pieces of a sequence that is not packed. owner: int64 [total], the sequence of each piece of a packed row.
    """

    size: int
    each: int
    total: int
    owner: Tensor | None


def cut(tokens: int, sequences: int, size: int, cu_seqlens: Tensor | None) -> Pieces:
    """Cut every sequence at each `size` tokens; see `span_of` for the numbers of the pieces."""
    if cu_seqlens is None:
        each = cdiv(tokens, size)
        return Pieces(size, each, sequences * each, None)
    total = tokens // size + sequences
    sequence = torch.arange(sequences, device=cu_seqlens.device)
    first = cu_seqlens[:-1].long() // size + sequence
    owner = torch.searchsorted(first, torch.arange(total, device=cu_seqlens.device), right=True) - 1
    return Pieces(size, 0, total, owner)


@dataclass(frozen=True)
class Call:
    """The arguments of one call, laid out for the kernels; `segments` are what one program runs through."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    dt_softplus: bool
    sequences: int
    segments: Pieces
    blocks: Blocks

    @property
    def split(self) -> bool:
        """True if a sequence may have several segments."""
        return self.segments.size < self.x.shape[1]

    @property
    def programs(self) -> int:
        """Programs of a pass over all segments."""
        groups = self.B.shape[2]
        return self.segments.total * groups * int(cdiv(self.x.shape[2] // groups, self.blocks.e))

    @property
    def sizes(self) -> dict[str, Any]:
        """Constants that the kernels over segments share."""
        return {
            "E": self.x.shape[2], "G": self.B.shape[2], "N": self.B.shape[3], "PACKED": self.cu_seqlens is not None,
            "HAS_BIAS": self.dt_bias is not None, "SOFTPLUS": self.dt_softplus, "TILE": self.blocks.tile,
            "TOUCH": self.blocks.touch,
        } | self.tiles  # fmt: skip

    @property
    def tiles(self) -> dict[str, int]:
        """Constants of the state's tiles."""
        blocks = self.blocks
        return {"TILES": blocks.tiles, "ROWS": blocks.rows, "BLOCK_E": blocks.e, "num_warps": blocks.warps}


def prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    *,
    table: dict[int, Blocks],
) -> Call:
    """table: AHEAD or BACK of the tuning."""
    batch, tokens, channels = x.shape
    groups, state = B.shape[2:]
    blocks = sizes_of(x, state, table)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    cu_seqlens = contiguous(cu_seqlens)
    rows = batch if cu_seqlens is None else 1
    size = segment_length(rows, tokens, groups * int(cdiv(channels // groups, blocks.e)), blocks)
    gate = None if z is None else flat(z)
    A, D, dt_bias = single(A), None if D is None else single(D), None if dt_bias is None else single(dt_bias)
    return Call(
        flat(x), flat(dt), A, single(B), single(C), D, gate, dt_bias, contiguous(initial_state), cu_seqlens,
        dt_softplus, sequences, cut(tokens, sequences, size, cu_seqlens), blocks,
    )  # fmt: skip


def sizes_of(x: Tensor, state: int, table: dict[int, Blocks]) -> Blocks:
    """Row of the table for N = `state`, half the tokens at a time for float32: accurate exponentials compile slowly."""
    blocks = blocks_for(table, state)
    return replace(blocks, tile=max(1, blocks.tile // 2)) if x.dtype == torch.float32 else blocks


def flat(part: Tensor) -> Tensor:
    """`part` [B,T,...] itself if its last axis is contiguous and token t of row b lies at b T + t; else a copy."""
    rows = part.shape[0] == 1 or part.stride(0) == part.shape[1] * part.stride(1)
    return part if rows and part.stride(-1) == 1 else part.contiguous()


def single(part: Tensor) -> Tensor:
    """`part` contiguous in float32."""
    return part.to(torch.float32).contiguous()


def arriving(call: Call, value: Tensor, key: Tensor, given: Tensor | None, *, reverse: bool) -> Tensor:
    """State at the start of every segment, or its gradient at the end, [segments,E,N] float32.

    value, key: x and B, or dy and C in reverse. given: initial states or gradients of the final ones [S,E,N].
    """
    channels, state = call.x.shape[2], call.B.shape[3]
    segments, gate = call.segments, call.z if reverse else None
    carried = torch.empty((segments.total, channels, state), dtype=torch.float32, device=value.device)
    elapsed = torch.empty((segments.total, channels), dtype=torch.float32, device=value.device)
    summary_kernel[(call.programs,)](
        value, call.dt, gate, key, call.A, call.dt_bias, segments.owner, call.cu_seqlens, carried, elapsed,
        value.shape[1], segments.each, segments.size, value.stride(1), call.dt.stride(1),
        0 if gate is None else gate.stride(1), HAS_Z=gate is not None, REVERSE=reverse, **call.sizes,
    )  # fmt: skip
    link_kernel[(call.sequences * cdiv(channels, call.blocks.e),)](
        call.A, given, elapsed, call.cu_seqlens, carried, value.shape[1], segments.each, segments.size,
        E=channels, N=state, HAS_GIVEN=given is not None, PACKED=call.cu_seqlens is not None, REVERSE=reverse,
        **call.tiles,
    )  # fmt: skip
    return carried


def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y [B,T,E], final state [S,E,N], and the states at multiples of CHUNK inside sequences [BT // CHUNK,E,N].

    Arguments as in `selective_scan_triton`.
    """
    call = prepare(*inputs, table=tuning.AHEAD)
    x, state = call.x, call.B.shape[3]
    batch, tokens, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    states = torch.empty((batch * tokens // triton_path.CHUNK, channels, state), dtype=torch.float32, device=x.device)
    final = torch.empty((call.sequences, channels, state), dtype=torch.float32, device=x.device)
    with on_device(x):
        entering = arriving(call, x, call.B, call.initial_state, reverse=False) if call.split else None
        scan_kernel[(call.programs,)](
            x, call.dt, call.z, call.B, call.C, call.A, call.D, call.dt_bias, call.initial_state, entering,
            call.segments.owner, call.cu_seqlens, y, states, final,
            tokens, call.segments.each, call.segments.size,
            x.stride(1), call.dt.stride(1), 0 if call.z is None else call.z.stride(1),
            HAS_D=call.D is not None, HAS_Z=call.z is not None, HAS_INITIAL=call.initial_state is not None,
            SPLIT=entering is not None, CHUNK=triton_path.CHUNK, **call.sizes,
        )  # fmt: skip
    return y, final, states

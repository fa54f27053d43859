"""Launches the kernels of LTI attention with block sizes that follow from widths and dtype; nothing is searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.lti_attention.kernels.mixing import mix_kernel
from zoo.ops.lti_attention.kernels.states import states_kernel
from zoo.ops.lti_attention.kernels.tables import table_gradient_kernel, tap_gradient_kernel
from zoo.ops.semiseparable.kernels.launch import OPERANDS, contiguous, flat, strides

ENOUGH_PROGRAMS = 1024  # several for every multiprocessor of a large GPU


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call and the blocks chosen for it.

    common: constexpr arguments of every kernel. slots: room for the chunks of all sequences, see `token_range`.
    """

    T: int
    H: int
    M: int
    P: int
    S: int
    slots: int
    chunk: int
    tile: int
    row_blocks: int
    block_p: int
    block_v: int
    common: dict[str, Any]
    rows: dict[str, Any]  # of the kernels that see states

    @property
    def column_blocks(self) -> int:
        return -(-self.P // self.block_v)

    @property
    def tiles(self) -> int:
        return self.chunk // self.tile


def sizes_of(v: Tensor, taps: Tensor, modes: int, cu_seqlens: Tensor | None) -> Sizes:
    """Blocks by width and dtype.

    IEEE float32 products run without tensor cores and hold their operands in registers, so tiles are shorter.
    """
    B, T, H, P = v.shape
    chunk = taps.shape[1]
    single = v.dtype == torch.float32
    tile = 32 if single else 64
    block_k = next_power_of_2(P)
    rows = max(16, block_k, min(tile, next_power_of_2(modes) * block_k))
    if cu_seqlens is None:
        S, slots = B, B * cdiv(T, chunk)
    else:
        S = cu_seqlens.numel() - 1
        slots = T // chunk + S
    warps = 8 if block_k > 64 or (single and block_k == 64) else 4
    common = {
        "H": H, "P": P, "PACKED": cu_seqlens is not None, "CHUNK": chunk, "TILE": tile, "OPERAND": OPERANDS[v.dtype],
        "num_warps": warps, "num_stages": 2,
    }  # fmt: skip
    block_p = max(16, block_k)
    return Sizes(
        T, H, modes, P, S, slots, chunk, tile, cdiv(modes * block_k, rows), block_p, min(64, block_p), common,
        {"M": modes, "BLOCK_K": block_k, "ROWS": rows},
    )  # fmt: skip


def owners(size: Sizes, cu_seqlens: Tensor | None) -> Tensor | None:
    """Sequence of each slot, int64 [slots], of a packed row."""
    if cu_seqlens is None:
        return None
    first = cu_seqlens[:-1].long() // size.chunk + torch.arange(size.S, device=cu_seqlens.device)
    return torch.searchsorted(first, torch.arange(size.slots, device=first.device), right=True) - 1


def chunk_states(
    size: Sizes,
    left: Tensor,
    right: Tensor,
    powers: Tensor,
    read: Tensor,
    first: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
    states: bool,
    last: bool,
) -> tuple[Tensor, Tensor]:
    """States of every chunk [slots,H,M,2,P,P] and the one at the end [S,H,M,2,P,P]; empty where not asked for.

    States are operands of products, and stored as such: bfloat16 beside bfloat16 inputs, else float32.
    """
    shape = (size.H, size.M, 2, size.P, size.P)
    kept = torch.bfloat16 if right.dtype == torch.bfloat16 else torch.float32
    stored = torch.empty((size.slots, *shape) if states else 0, dtype=kept, device=right.device)
    end = torch.empty((size.S, *shape) if last else 0, dtype=torch.float32, device=right.device)
    states_kernel[(size.S * size.H, size.row_blocks, size.column_blocks)](
        left, right, powers, read, first, cu_seqlens, stored, end, size.T, *strides(left, right),
        HAS_FIRST=first is not None, REVERSE=reverse, STORE_STATES=states, STORE_LAST=last,
        BLOCK_V=size.block_v, **size.common, **size.rows,
    )  # fmt: skip
    return stored, end


def mix(
    size: Sizes,
    a: Tensor,
    b: Tensor,
    w: Tensor,
    taps: Tensor,
    table: Tensor,
    states: Tensor | None,
    cu_seqlens: Tensor | None,
    owner: Tensor | None,
    *,
    always: bool,
    reverse: bool = False,
    transposed: bool = False,
) -> Tensor:
    """See `mix_kernel`. states: None if none is read. always: the first chunk of a sequence reads one, too."""
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    mix_kernel[(size.slots * size.tiles * size.H, size.column_blocks)](
        a, b, w, taps, table, states, cu_seqlens, owner, out, size.T, *strides(a, b, w),
        LAGS=table.shape[-1], HAS_STATES=states is not None, HAS_FIRST=always, REVERSE=reverse, TRANSPOSED=transposed,
        BLOCK_P=size.block_p, BLOCK_V=size.block_v, **size.common, **size.rows,
    )  # fmt: skip
    return out


def several_chunks(size: Sizes, cu_seqlens: Tensor | None) -> bool:
    """Whether a sequence may have more than one chunk; lengths of packed ones are not looked at."""
    return size.chunk < size.T if cu_seqlens is not None else size.slots > size.S


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    powers: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B,T,H,P] and the final state [S,H,M,2,P,P] float32; arguments as in `lti_attention_forward`."""
    size = sizes_of(v, taps, read.shape[2], cu_seqlens)
    q, k, v = flat(q), flat(k), flat(v)
    initial_state, cu_seqlens = contiguous(initial_state), contiguous(cu_seqlens)
    reads = initial_state is not None or several_chunks(size, cu_seqlens)
    with on_device(v):
        entering, final = chunk_states(
            size, k, v, powers, read, initial_state, cu_seqlens, reverse=False, states=reads, last=True
        )
        y = mix(
            size, q, k, v, taps, read, entering if reads else None, cu_seqlens, owners(size, cu_seqlens),
            always=initial_state is not None,
        )  # fmt: skip
    return y, final


def backward(
    dy: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    powers: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, taps, powers, read and the initial state (empty if absent).

    Chunk states are computed anew; with their gradients they live in scratch memory: 16 H M P^2 bytes a chunk, half of
    it in bfloat16. Order of summation is fixed, so gradients are the same in every run.
    """
    size = sizes_of(v, taps, read.shape[2], cu_seqlens)
    dy, q, k, v = flat(dy.to(v.dtype)), flat(q), flat(k), flat(v)
    initial_state, cu_seqlens = contiguous(initial_state), contiguous(cu_seqlens)
    given = initial_state is not None
    owner = owners(size, cu_seqlens)
    with on_device(v):
        entering, _ = chunk_states(
            size, k, v, powers, read, initial_state, cu_seqlens, reverse=False, states=True, last=False
        )
        leaving, dinitial = chunk_states(
            size, q, dy, powers, read, dfinal.contiguous(), cu_seqlens, reverse=True, states=True, last=given
        )
        reads = entering if given or several_chunks(size, cu_seqlens) else None
        dq = mix(size, dy, v, k, taps, read, reads, cu_seqlens, owner, always=given, transposed=True)
        dv = mix(size, k, q, dy, taps, powers, leaving, cu_seqlens, owner, always=True, reverse=True)
        dk = mix(size, v, dy, q, taps, powers, leaving, cu_seqlens, owner, always=True, reverse=True, transposed=True)
        dtaps = tap_gradient(size, q, k, v, dy, cu_seqlens, owner)
        dread = table_gradient(size, read, q, dy, entering, entering, cu_seqlens, owner, given, powers=False)
        dpowers = table_gradient(size, powers, k, v, leaving, entering, cu_seqlens, owner, given, powers=True)
    return dq, dk, dv, dtaps, dpowers, dread, dinitial


def table_gradient(
    size: Sizes,
    table: Tensor,
    a: Tensor,
    b: Tensor,
    states: Tensor,
    entering: Tensor,
    cu_seqlens: Tensor | None,
    owner: Tensor | None,
    given: bool,
    *,
    powers: bool,
) -> Tensor:
    """See `table_gradient_kernel`; [H,2,M,LAGS] float32."""
    made = torch.empty(table.shape, dtype=torch.float32, device=a.device)
    lags = table.shape[-1]
    table_gradient_kernel[(cdiv(lags, size.tile) * size.H, size.row_blocks)](
        a, b, states, entering, cu_seqlens, owner, made, size.T, size.slots, *strides(a, b),
        LAGS=lags, HAS_FIRST=given, POWERS=powers, BLOCK_P=size.block_p, **size.common, **size.rows,
    )  # fmt: skip
    return made


def tap_gradient(
    size: Sizes, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, cu_seqlens: Tensor | None, owner: Tensor | None
) -> Tensor:
    """Gradient of the taps, [H,CHUNK] float32: pairs of tiles by their distance, then sums along diagonals."""
    tile, tiles = size.tile, size.tiles
    splits = max(1, min(size.slots, ENOUGH_PROGRAMS // (size.H * tiles)))
    each = cdiv(size.slots, splits)
    sums = torch.empty((splits, size.H, tiles, tile, tile), dtype=torch.float32, device=q.device)
    tap_gradient_kernel[(size.H * tiles, splits)](
        q, k, v, dy, cu_seqlens, owner, sums, size.T, size.slots, each, *strides(q, k, v, dy),
        BLOCK_P=size.block_p, **size.common,
    )  # fmt: skip
    return diagonal_sums(sums.sum(0)).flatten(1)


def diagonal_sums(pairs: Tensor) -> Tensor:
    """[H,D,K,K] -> [H,D,K]: entry [d,i,j] belongs to lag d K + i - j; what lies at lags below 0 is dropped."""
    tile = pairs.shape[-1]
    skewed = F.pad(pairs.flip(-1), (0, tile)).flatten(-2)[..., : tile * (2 * tile - 1)]
    sums = skewed.unflatten(-1, (tile, 2 * tile - 1)).sum(-2)  # [H,D,2K-1], lag d K + u - (K - 1)
    later = F.pad(sums[:, 1:, : tile - 1], (1, 0, 0, 1))  # lags 1 .. K-1 of the block before
    total: Tensor = sums[..., tile - 1 :] + later
    return total

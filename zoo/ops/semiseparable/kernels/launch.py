"""Launches the kernels of the semiseparable scan with block sizes that were checked; nothing is searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.semiseparable.kernels.forward import forward_kernel
from zoo.ops.semiseparable.kernels.gradients import key_gradient_kernel, value_gradient_kernel
from zoo.ops.semiseparable.kernels.states import states_kernel

OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call and the blocks chosen for it. blocks: constexpr arguments common to all kernels."""

    T: int
    H: int
    S: int
    slots: int  # room for the chunks of all sequences, see `token_range`
    column_blocks: int  # blocks of P
    blocks: dict[str, Any]


def sizes_of(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Sizes:
    """Blocks by width and dtype.

    A [CHUNK, BLOCK_N] tile of a dot operand stays within 32 KB, so that two stages of q and k fit in shared memory.
    IEEE float32 products run without tensor cores and hold their operands in registers: shorter chunks, more warps.
    One tile of 16 or 32 columns beside 128 rows or more: gradients were wrong on an H100 with the assembler of Triton
    3.6, ptxas 12.8, and right with 13.0. Two such tiles, or one of 64, are right with both.
    """
    B, T, H, P = v.shape
    G, N = q.shape[2:]
    single = v.dtype == torch.float32
    operand_bytes = 2 if v.dtype == torch.bfloat16 else 4
    block_n = max(16, next_power_of_2(N))
    block_p = min(64 if operand_bytes == 2 and block_n <= 128 else 32, max(16, next_power_of_2(P)))
    if block_n >= 128 and operand_bytes == 2 and block_p >= P:
        block_p = 64
    chunk = 32 if single or block_n * operand_bytes > 512 else 64
    warps = 8 if single and block_n >= 64 else 4
    if cu_seqlens is None:
        S, slots = B, B * cdiv(T, chunk)
    else:
        S = cu_seqlens.numel() - 1
        slots = T // chunk + S
    constants = {"CHUNK": chunk, "BLOCK_N": block_n, "BLOCK_P": block_p, "OPERAND": OPERANDS[v.dtype]}
    blocks = constants | {"H": H, "J": H // G, "N": N, "P": P, "PACKED": cu_seqlens is not None}
    return Sizes(T, H, S, slots, cdiv(P, block_p), blocks | {"num_warps": warps, "num_stages": 2})


def flat(part: Tensor) -> Tensor:
    """`part` [B,T,X,Y] itself if Y is contiguous and token t of row b lies at b T + t steps, else a copy that is so."""
    size, step = part.shape, part.stride()
    rows = size[0] == 1 or step[0] == size[1] * step[1]
    return part if rows and step[3] == 1 else part.contiguous()


def contiguous(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.contiguous()


def strides(*parts: Tensor) -> list[int]:
    """Steps of the token and the head axis of each [B,T,X,Y]."""
    return [step for part in parts for step in part.stride()[1:3]]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B,T,H,P] and the final state [S,H,P,N] float32; arguments as in `semiseparable`."""
    size = sizes_of(q, v, cu_seqlens)
    q, k, v = flat(q), flat(k), flat(v)
    log_decay, scale, initial_state = contiguous(log_decay), contiguous(scale), contiguous(initial_state)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = torch.empty((size.S, size.H, v.shape[3], q.shape[3]), dtype=torch.float32, device=v.device)
    with on_device(v):
        forward_kernel[(size.S * size.H, size.column_blocks)](
            q, k, v, log_decay, scale, initial_state, contiguous(cu_seqlens), y, final,
            size.T, *strides(q, k, v),
            HAS_DECAY=log_decay is not None, HAS_SCALE=scale is not None, HAS_INITIAL=initial_state is not None,
            **size.blocks,
        )  # fmt: skip
    return y, final


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, scale and the initial state; empty tensors for those that are absent.

    dfinal: None for zeros.
    Chunk states are computed anew, and with their gradients live in scratch memory until the end of this function:
    8 H N P bytes for every chunk. Order of summation is fixed, so gradients are the same in every run.
    """
    size = sizes_of(q, v, cu_seqlens)
    dy, q, k, v = flat(dy.to(v.dtype)), flat(q), flat(k), flat(v)
    log_decay, scale, initial_state = contiguous(log_decay), contiguous(scale), contiguous(initial_state)
    cu_seqlens, dfinal = contiguous(cu_seqlens), contiguous(dfinal)
    B, T, H, P = v.shape
    G, N = q.shape[2:]

    def scratch(*shape: int, wanted: bool = True) -> Tensor:
        return torch.empty(shape if wanted else 0, dtype=torch.float32, device=v.device)

    entering, leaving = scratch(size.slots, H, N, P), scratch(size.slots, H, N, P)
    dinitial = scratch(size.S, H, P, N, wanted=initial_state is not None)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dq, dk = scratch(B, T, H, N), scratch(B, T, H, N)
    da = scratch(B, T, H, wanted=log_decay is not None)
    dscale = scratch(B, T, H, wanted=scale is not None)
    owner = None
    if cu_seqlens is not None:
        sequence = torch.arange(size.S, device=v.device)
        first_slot = cu_seqlens[:-1].long() // size.blocks["CHUNK"] + sequence
        owner = torch.searchsorted(first_slot, torch.arange(size.slots, device=v.device), right=True) - 1
    options = {"HAS_DECAY": log_decay is not None, "HAS_SCALE": scale is not None} | size.blocks
    with on_device(v):
        states_kernel[(size.S * H, size.column_blocks)](
            k, v, log_decay, scale, initial_state, cu_seqlens, entering, dinitial, T, *strides(k, v),
            HAS_FIRST=initial_state is not None, REVERSE=False, STORE_LAST=False, **options,
        )  # fmt: skip
        states_kernel[(size.S * H, size.column_blocks)](
            q, dy, log_decay, scale, dfinal, cu_seqlens, leaving, dinitial, T, *strides(q, dy),
            HAS_FIRST=dfinal is not None, REVERSE=True, STORE_LAST=initial_state is not None, **options,
        )  # fmt: skip
        value_gradient_kernel[(size.slots * H,)](
            q, k, v, dy, log_decay, scale, cu_seqlens, owner, leaving, dv, dscale, T, *strides(q, k, v, dy), **options
        )
        key_gradient_kernel[(size.slots * H,)](
            q, k, v, dy, log_decay, scale, cu_seqlens, owner, entering, leaving, dq, dk, da,
            T, *strides(q, k, v, dy), **options,
        )  # fmt: skip
    dq, dk = (part.unflatten(2, (G, H // G)).sum(3).to(q.dtype) for part in (dq, dk))
    return dq, dk, dv, da, dscale, dinitial

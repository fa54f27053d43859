"""SSD forward by the walk: one program goes along a sequence of one head with its state in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.semiseparable.kernels.chunks import chunks_of, decay_sums
from zoo.ops.semiseparable.kernels.launch import flat
from zoo.ops.semiseparable.kernels.walk_launch import Decays, State, blocks_for, walk
from zoo.ops.ssd.kernels import march_launch


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    has_softplus: bool, limits: tuple[float, float], start: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B,T,H,P] and the final state [S,H,P,N], float32. A, D, dt_bias: float32 [H]; start: float32 [S,H,P,N].

    x, B and C are of one half precision dtype, N is a multiple of 16, time steps are not negative.
    """
    run = march_launch.forward if march_launch.serves(x, B) else walked
    return run(x, dt, A, B, C, D, dt_bias, has_softplus, limits, start, cu_seqlens)


def walked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    has_softplus: bool, limits: tuple[float, float], start: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`forward` by the walk that linear attention shares."""
    x, B, C = flat(x), flat(B), flat(C)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    chunks = chunks_of(x, cu_seqlens, blocks_for(x.dtype, B.shape[3]).chunk)
    with on_device(x):
        s, r = decay_sums(chunks, dt, A, dt_bias, has_softplus, limits)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty((chunks.sequences, *x.shape[2:], B.shape[3]), dtype=torch.float32, device=x.device)
    walk(
        C, B, x, y, cu_seqlens, decays=Decays(s, r, chunks.first if chunks.packed else None), skip=D,
        start=State(None if start is None else start.contiguous().mT), end=State(final.mT),
    )  # fmt: skip
    return y, final

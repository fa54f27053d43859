"""The semiseparable scan forward by the walk, in half precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.semiseparable.kernels.chunks import chunks_of, decay_sums
from zoo.ops.semiseparable.kernels.launch import contiguous, flat
from zoo.ops.semiseparable.kernels.walk_launch import Decays, State, Tokens, blocks_for, walk


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B,T,H,P] and the final state [S,H,P,N] float32; arguments as in `semiseparable`, q, k, v of half precision.

    The widths of q and k are a multiple of 16. Scales ride on the scores and on the values that enter the state, in
    float32; sums of decays take those of time steps of 1, whose logarithm is 0.
    """
    q, k, v, cu_seqlens = flat(q), flat(k), flat(v), contiguous(cu_seqlens)
    B, T, H, P = v.shape
    N = q.shape[3]
    decays = None
    if log_decay is not None:
        chunks = chunks_of(v, cu_seqlens, blocks_for(v.dtype, N).chunk)
        ones = torch.ones(H, dtype=torch.float32, device=v.device)
        with on_device(v):
            s, _ = decay_sums(chunks, log_decay, ones, None, False, (-math.inf, math.inf))
        decays = Decays(s, s, chunks.first if chunks.packed else None)
    weights = None if scale is None else Tokens(scale.reshape(B * T, H))
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    S = B if cu_seqlens is None else cu_seqlens.numel() - 1
    final = torch.empty((S, H, P, N), dtype=torch.float32, device=v.device)
    walk(
        q, k, v, y, cu_seqlens, decays=decays, weights=weights,
        start=State(None if initial_state is None else initial_state.contiguous().mT), end=State(final.mT),
    )  # fmt: skip
    return y, final

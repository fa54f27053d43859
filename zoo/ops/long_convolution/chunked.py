"""The long convolution as products with Toeplitz tiles in plain PyTorch: exactly causal, at T K work."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.long_convolution.call import Convolution
from zoo.ops.long_convolution.cost import CHUNK
from zoo.ops.semiseparable.chunked import Layout, packed_in_chunks, rows_in_chunks


def convolve_chunked(x: Tensor, call: Convolution) -> Tensor:
    """x [B,T,D] -> y [B,T,D]."""
    u = call.gate_in(x)
    if x.numel() == 0:
        return call.gate_out(u, u, x)
    if call.cu_seqlens is None:
        layout = rows_in_chunks(u, min(CHUNK, x.shape[1]))
    else:
        layout = packed_in_chunks(u, call.cu_seqlens)
    u_DRCK = layout.split(u).permute(3, 0, 1, 2)
    kernel, ahead = call.taps(x.shape[1], u)
    index = torch.arange(layout.chunks, device=u.device)
    age = index - torch.where(layout.starts, index, 0).cummax(0).values  # chunks since the sequence began
    y_DRCK = torch.zeros_like(u_DRCK)
    for apart in range(-reach(ahead, call.reverse_lag, layout), reach(kernel, 0, layout) + 1):
        tiles = toeplitz_tile(kernel, apart * layout.chunk, layout.chunk)
        if ahead is not None and apart <= 0:
            tiles = tiles + toeplitz_tile(ahead, -apart * layout.chunk - call.reverse_lag, layout.chunk).mT
        if apart == 0:
            y_DRCK = y_DRCK + product(u_DRCK, tiles)
            continue
        # the chunk that is `apart` chunks earlier (later, if negative), where it belongs to the same sequence
        distance = abs(apart)
        whose = age[distance:] >= distance
        if apart > 0:
            given = torch.where(whose.unsqueeze(-1), u_DRCK[:, :, :-distance], 0.0)
            y_DRCK = y_DRCK + F.pad(product(given, tiles), (0, 0, distance, 0))
        else:
            given = torch.where(whose.unsqueeze(-1), u_DRCK[:, :, distance:], 0.0)
            y_DRCK = y_DRCK + F.pad(product(given, tiles), (0, 0, 0, distance))
    return call.gate_out(layout.join(y_DRCK.permute(1, 2, 3, 0)), u, x)


def product(u_DRCK: Tensor, tiles: Tensor) -> Tensor:
    """Every chunk of a channel times the channel's tile [D,K,K]."""
    flat = u_DRCK.flatten(1, 2) @ tiles
    return flat.view(u_DRCK.shape)


def reach(taps: Tensor | None, lag: int, layout: Layout) -> int:
    """Chunks between a token and the furthest one that taps [D,K], the first of them at `lag`, meet."""
    if taps is None:
        return 0
    return min(layout.chunks - 1, (taps.shape[1] - 1 + lag + layout.chunk - 1) // layout.chunk)


def toeplitz_tile(taps: Tensor, first: int, size: int) -> Tensor:
    """[D,j,i] = taps at lag first + i - j, 0 where there is no such tap. taps [D,K] -> [D,size,size]."""
    steps = torch.arange(size, device=taps.device)
    lag = first + steps - steps.unsqueeze(1)
    inside = (lag >= 0) & (lag < taps.shape[1])
    return torch.where(inside, taps[:, lag.clamp(0, taps.shape[1] - 1)], 0.0)

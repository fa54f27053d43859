"""The diagonal scan in plain PyTorch: a Toeplitz tile inside chunks, complex states (as real pairs) between them.

Exactly causal. Everything inside a chunk is one matrix product per channel, for both directions; every mode is carried
over chunks by the same number, so the scan over chunks doubles its reach in each step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.long_convolution.chunked import toeplitz_tile
from zoo.ops.lti.call import Scan
from zoo.ops.lti.cost import CHUNK
from zoo.ops.lti.factors import directions
from zoo.ops.lti.modes import power, times
from zoo.ops.lti.one_token import scan_one_token
from zoo.ops.semiseparable.chunked import Layout, packed_in_chunks, rows_in_chunks

Pair = tuple[Tensor, Tensor]  # real and imaginary parts


def scan_chunked(x: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
    """x [B,T,D] -> y [B,T,D], final state [S,D,M,2]."""
    if x.numel() == 0:
        return scan.untouched(x)
    tokens, inner = x.shape[1], accumulation_dtype(x.dtype)
    if tokens == 1 and scan.cu_seqlens is None:
        return scan_one_token(x, scan)
    layout = rows_in_chunks(x, min(CHUNK, tokens)) if scan.cu_seqlens is None else packed_in_chunks(x, scan.cu_seqlens)
    ways = directions(scan, layout.chunk, inner)
    x_RCKD = layout.split(x.to(inner))
    x_DLK = x_RCKD.permute(3, 0, 1, 2).flatten(1, 2)  # L = R C chunks
    tiles = toeplitz_tile(ways[0].taps, 0, layout.chunk)
    into = [tiles, ways[0].write.mT]
    if len(ways) == 2:
        into = [tiles + toeplitz_tile(ways[1].taps, 0, layout.chunk).mT, ways[0].write.mT, ways[1].write.flip(2).mT]
    y_DLK, *added = (x_DLK @ torch.cat(into, 2)).split([part.shape[2] for part in into], 2)

    modes = scan.log_a.shape[1]
    starts = layout.starts
    first = None if scan.initial_state is None else _first_states(scan.initial_state.to(inner), layout)
    entering = entering_states(_chunks(added[0], layout, modes), scan.log_a, first, starts, layout.chunk)
    if layout.chunks > 1 or first is not None:
        y_DLK = y_DLK + torch.cat(entering, -1).flatten(1, 2) @ ways[0].read
    if len(ways) == 2 and layout.chunks > 1:
        re, im = (part.flip(2) for part in _chunks(added[1], layout, modes))
        ends = torch.cat([starts[1:], torch.ones_like(starts[:1])]).flip(0)
        later = entering_states((re, im), scan.log_a, None, ends, layout.chunk)
        y_DLK = y_DLK + torch.cat(later, -1).flip(2).flatten(1, 2) @ ways[1].read.flip(2)
    y = layout.join(y_DLK.unflatten(1, x_RCKD.shape[:2]).permute(1, 2, 3, 0))
    return y.to(x.dtype), _final_states(x_RCKD, entering, ways[0].write, scan, layout)


def _chunks(added: Tensor, layout: Layout, modes: int) -> Pair:
    """[D,R C,2M] -> real and imaginary parts [D,R,C,M]."""
    re, im = added.unflatten(1, (-1, layout.chunks)).split(modes, -1)
    return re, im


def _first_states(initial_state: Tensor, layout: Layout) -> Pair:
    """Initial states [S,D,M,2] as the states before the chunks of their sequences, broadcast against [D,R,C,M]."""
    if layout.sequence is None:
        given = initial_state.movedim(0, 1).unsqueeze(2)
    else:
        given = initial_state[layout.sequence].movedim(0, 1).unsqueeze(1)
    return given[..., 0], given[..., 1]


def entering_states(added: Pair, log_a: Tensor, first: Pair | None, starts: Tensor, chunk: int) -> Pair:
    """State before each chunk [D,R,C,M]: that at the start of its sequence, and what the chunks since then added.

    added: what each chunk adds, [D,R,C,M]. log_a: [D,M,2]. first: states before the sequences, or None for zeros.
    starts: bool [C], chunks that begin a sequence. chunk: tokens of each.
    """
    count = starts.numel()
    index = torch.arange(count, device=starts.device)
    age = (index - torch.where(starts, index, 0).cummax(0).values).unsqueeze(-1)  # chunks since the sequence began
    before = [F.pad(part[:, :, :-1], (0, 0, 1, 0)) for part in added]
    given = [torch.zeros((), dtype=part.dtype, device=part.device) for part in added] if first is None else first
    re, im = (torch.where(starts.unsqueeze(-1), old, new) for old, new in zip(given, before, strict=True))
    reach = 1
    while reach < count:
        a_re, a_im = (part.to(re.dtype)[:, None, None] for part in power(log_a, reach * chunk))
        earlier = times((re[:, :, :-reach], im[:, :, :-reach]), (a_re, a_im))
        linked = age[reach:] >= reach
        re, im = (
            part + F.pad(torch.where(linked, old, 0.0), (0, 0, reach, 0))
            for part, old in zip((re, im), earlier, strict=True)
        )
        reach *= 2
    return re, im


def _final_states(x_RCKD: Tensor, entering: Pair, write: Tensor, scan: Scan, layout: Layout) -> Tensor:
    """State after the last token of each sequence [S,D,M,2]; its last chunk may not be full."""
    chunk, inner = layout.chunk, x_RCKD.dtype
    tail = layout.last(x_RCKD)  # [S,K,D]
    before = [layout.last(part.permute(1, 2, 0, 3)) for part in entering]  # [S,D,M]
    if scan.cu_seqlens is None:
        filled = layout.tokens - (layout.chunks - 1) * chunk
        tail = F.pad(tail[:, :filled], (0, 0, chunk - filled, 0))
        factor = power(scan.log_a, filled)
    else:
        lengths = scan.cu_seqlens.long().diff()
        left = (lengths - (lengths - 1).clamp(min=0) // chunk * chunk).unsqueeze(1)  # tokens of the last chunk, [S,1]
        source = torch.arange(chunk, device=left.device) - (chunk - left)  # [S,K], moved to the chunk's end
        moved = tail.gather(1, source.clamp(min=0).unsqueeze(-1).expand(-1, -1, tail.shape[2]))
        tail = torch.where((source >= 0).unsqueeze(-1), moved, 0.0)
        factor = power(scan.log_a, left.unsqueeze(2))
    added = (tail.permute(2, 0, 1) @ write.mT).transpose(0, 1).split(scan.log_a.shape[1], -1)
    kept = times((before[0], before[1]), (factor[0].to(inner), factor[1].to(inner)))
    final = torch.stack([old + new for old, new in zip(kept, added, strict=True)], -1)
    if layout.empty is not None:
        nothing = torch.zeros_like(final) if scan.initial_state is None else scan.initial_state.to(inner)
        final = torch.where(layout.empty[:, None, None, None], nothing, final)
    return final

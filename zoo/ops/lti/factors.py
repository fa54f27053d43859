"""What the chunks of a diagonal scan share: tables of each channel, made in float64 and rounded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.ops.lti.call import Scan
from zoo.ops.lti.modes import powers, times


@dataclass(frozen=True)
class Factors:
    """Tables of one direction. K tokens of a chunk, M modes as real and imaginary halves of an axis of 2M.

    taps: [D,K], lag l of the kernel.
    write: [D,2M,K], what token j leaves in the state at the chunk's end: e^{(K-1-j) log_a}.
    read: [D,2M,K], y_i = sum read s of the state s before the chunk: 2 Re(c e^{(i+1-lag) log_a} s).
    """

    taps: Tensor
    write: Tensor
    read: Tensor


def chunk_factors(log_a: Tensor, c: Tensor, chunk: int, dtype: torch.dtype, lag: int = 0) -> Factors:
    """Tables of the kernel K_l = 2 Re sum_n c_n e^{(l-lag) log_a_n}, l >= lag. log_a, c [D,M,2]; lag 0 or 1."""
    raised = powers(log_a, torch.arange(chunk + 1, device=log_a.device))  # [D,M,K+1]
    weight = (2.0 * c.double()).unsqueeze(-2)
    seen_re, seen_im = times((weight[..., 0], weight[..., 1]), raised)
    taps = seen_re[..., :chunk].sum(1)
    if lag == 1:
        taps = torch.cat([torch.zeros_like(taps[:, :1]), taps[:, :-1]], 1)
    write = torch.cat(raised, 1)[..., :chunk].flip(2)
    read = torch.cat([seen_re, -seen_im], 1)[..., 1 - lag : chunk + 1 - lag]
    return Factors(taps.to(dtype), write.to(dtype), read.to(dtype))


def with_skip(taps: Tensor, D: Tensor | None) -> Tensor:
    """taps [D,K] with the weight D of the token itself, or None, as part of lag 0."""
    if D is None:
        return taps
    return torch.cat([taps[:, :1] + D.to(taps.dtype).unsqueeze(1), taps[:, 1:]], 1)


def directions(scan: Scan, chunk: int, dtype: torch.dtype) -> list[Factors]:
    """Tables forward in time, with the skip, and, with a reverse kernel, backward in time."""
    forward = chunk_factors(scan.log_a, scan.c, chunk, dtype)
    both = [Factors(with_skip(forward.taps, scan.D), forward.write, forward.read)]
    if scan.c_reverse is not None:
        both.append(chunk_factors(scan.log_a, scan.c_reverse, chunk, dtype, scan.reverse_lag))
    return both

"""The long convolution by real FFTs in the accumulation dtype, one spectrum of the kernel for the whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.long_convolution.call import Convolution


def convolve_fft(x: Tensor, call: Convolution) -> Tensor:
    """x [B,T,D] -> y [B,T,D]."""
    u = call.gate_in(x)
    if x.numel() == 0:
        convolved = u
    elif call.cu_seqlens is None:
        convolved = circular(u, *call.taps(x.shape[1], u), call.reverse_lag)
    else:
        convolved = packed(u, call, call.cu_seqlens)
    return call.gate_out(convolved, u, x)


def fft_length(least: int) -> int:
    """The smallest of 2^k, 3 2^k and 5 2^k that is even and at least `least`: lengths that transforms are fast at."""
    power = 1 << max(least - 1, 1).bit_length()
    return min(n for n in (power, power // 4 * 3, power // 8 * 5) if n >= least and n % 2 == 0)


def circular(u: Tensor, kernel: Tensor, ahead: Tensor | None, reverse_lag: int) -> Tensor:
    """u [B,T,D], kernel [D,K], ahead [D,K'] or None -> [B,T,D], all of one dtype.

    Padded so that neither the kernel's last tap nor the furthest tap ahead wraps around into a token.
    """
    tokens = u.shape[1]
    furthest = 0 if ahead is None else ahead.shape[1] - 1 + reverse_lag
    n = fft_length(tokens + max(kernel.shape[1] - 1, furthest))
    whole: Tensor = torch.fft.irfft(torch.fft.rfft(u, n, 1) * spectrum(kernel, ahead, reverse_lag, n), n, 1)
    return whole[:, :tokens]


def spectrum(kernel: Tensor, ahead: Tensor | None, reverse_lag: int, n: int) -> Tensor:
    """Spectrum [n/2+1,D] of taps [D,K] at lags 0, 1, ... and of taps ahead [D,K'] at lags -reverse_lag, ..."""
    spectra: Tensor = torch.fft.rfft(circular_taps(kernel, ahead, reverse_lag, n), n, 1)
    return spectra.t()


def circular_taps(kernel: Tensor, ahead: Tensor | None, reverse_lag: int, n: int) -> Tensor:
    """Taps [D,n] of a circular convolution: `kernel` [D,K] from lag 0 on, `ahead` [D,K'] from lag -reverse_lag back."""
    taps = F.pad(kernel, (0, n - kernel.shape[1]))
    if ahead is not None:
        around = F.pad(ahead, (reverse_lag, n - ahead.shape[1] - reverse_lag))  # at its distance ahead
        taps = taps + around.flip(1).roll(1, 1)  # at n - distance, and distance 0 at 0
    return taps


def packed(u: Tensor, call: Convolution, cu_seqlens: Tensor) -> Tensor:
    """u [1,T,D] with S sequences -> [1,T,D]. Sequences of like length are padded to one batch."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    if torch.compiler.is_compiling():
        groups = [(torch.arange(lengths.numel(), device=u.device), u.shape[1])]
    else:
        groups = groups_by_length(lengths)
    time = torch.arange(u.shape[1], device=u.device)
    owner = torch.searchsorted(cu_seqlens[1:].long(), time, right=True)
    out = torch.zeros_like(u)
    for members, longest in groups:
        step = torch.arange(longest, device=u.device)
        real = step < lengths[members].unsqueeze(1)  # [G,L]
        place = torch.where(real, starts[members].unsqueeze(1) + step, 0)
        rows = torch.where(real.unsqueeze(-1), u[0].index_select(0, place.flatten()).unflatten(0, place.shape), 0.0)
        rows = circular(rows, *call.taps(longest, u), call.reverse_lag)
        row_of = torch.full_like(lengths, -1).index_copy(0, members, torch.arange(members.numel(), device=u.device))
        row = row_of[owner]  # [T]
        mine = row.clamp(min=0) * longest + (time - starts[owner]).clamp(max=longest - 1)
        taken = rows.flatten(0, 1).index_select(0, mine)
        out = torch.where((row >= 0).unsqueeze(-1), taken, out)
    return out


def groups_by_length(lengths: Tensor) -> list[tuple[Tensor, int]]:
    """Sequences [G] with less than twice as many tokens as the shortest of them, and the longest length, per group."""
    values = lengths.tolist()
    by_size: dict[int, list[int]] = {}
    for sequence, length in enumerate(values):
        if length > 0:
            by_size.setdefault(length.bit_length(), []).append(sequence)
    return [
        (torch.tensor(members, device=lengths.device), max(values[member] for member in members))
        for members in by_size.values()
    ]

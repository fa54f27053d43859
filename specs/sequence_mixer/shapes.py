"""One legend of letters for the whole project, and the checks that speak it.

B batch                 T tokens                 D model width           H query heads
G groups (key heads)    P channels of a head     N state (key) channels  M random features
S packed sequences      W convolution width      E expanded width        C chunks
K key positions, kernel taps or buffer slots     R rank
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sequence_mixer.errors import DeviceError, DtypeError, PackingError, ShapeError

_debug = False


def set_debug(enabled: bool) -> None:
    """Turn value checks (mask runs, monotone `cu_seqlens`) on for every device, at the price of a synchronisation."""
    global _debug
    _debug = enabled


def checks_values(tensor: Tensor) -> bool:
    """True if the values of `tensor` may be looked at: eager mode, and on a CPU or under `set_debug(True)`."""
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or _debug)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of sums, decays, statistics and recurrent states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expect_shape(argument: str, tensor: Tensor, layout: str, sizes: dict[str, int] | None = None) -> dict[str, int]:
    """Check `tensor` against a layout such as "B T H P" and return the letters' sizes, old and new.

    argument: name the caller used, for the message.
    layout: letters (bound on first sight) or whole numbers, one per axis.
    sizes: letters already bound by earlier arguments; not changed.
    Raises ShapeError that quotes the shape that came and the one that was wanted.
    """
    letters = layout.split()
    bound = {} if sizes is None else dict(sizes)
    wrong = tensor.dim() != len(letters)
    if not wrong:
        for letter, size in zip(letters, tensor.shape, strict=True):
            wanted = int(letter) if letter.isdigit() else bound.setdefault(letter, size)
            wrong = wrong or wanted != size
    if wrong:
        known = {} if sizes is None else sizes
        wanted_shape = ", ".join(f"{letter}={known[letter]}" if letter in known else letter for letter in letters)
        raise ShapeError(f"{argument} has shape {list(tensor.shape)}, wanted [{wanted_shape}]")
    return bound


def expect_same_device(reference: Tensor, **others: Tensor | None) -> None:
    """Raise DeviceError if one of the named tensors is not on the device of `reference`."""
    for argument, tensor in others.items():
        if tensor is not None and tensor.device != reference.device:
            raise DeviceError(
                f"{argument} is on {tensor.device}, but the first input is on {reference.device}; move one of them"
            )


def expect_floating(argument: str, tensor: Tensor) -> None:
    """Raise DtypeError unless `tensor` is float16, bfloat16, float32 or float64."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise DtypeError(
            f"{argument} is {tensor.dtype}, wanted one of float16, bfloat16, float32, float64"
            + ("; complex numbers are stored as real pairs, [..., 2]" if tensor.is_complex() else "")
        )


def expect_cu_seqlens(cu_seqlens: Tensor, total: int, batch: int) -> int:
    """Check packed boundaries [S+1] of an input [1,T,...] with T = `total`, and return S.

    Raises PackingError if the batch is not 1, the dtype is not int32 or int64, or (where values may be looked
    at) the boundaries do not start at 0, decrease, or do not end at T.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise PackingError(f"cu_seqlens has shape {list(cu_seqlens.shape)}, wanted [S+1] with at least one sequence")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise PackingError(f"cu_seqlens is {cu_seqlens.dtype}, wanted int32 or int64")
    if batch != 1:
        raise PackingError(f"cu_seqlens goes with one packed row [1, T, ...]; the input has batch {batch}")
    if checks_values(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != total or any(b < a for a, b in itertools.pairwise(ends)):
            raise PackingError(f"cu_seqlens {_short(ends)} must rise from 0 to T={total} without decreasing")
    return cu_seqlens.numel() - 1


def expect_padding_mask(padding_mask: Tensor, batch: int, tokens: int) -> None:
    """Check a padding mask bool [B,T], True = real, real tokens of a row one contiguous run.

    Raises PackingError on a wrong shape or dtype, or (where values may be looked at) on a row with a hole.
    """
    if padding_mask.dtype != torch.bool:
        raise PackingError(f"padding_mask is {padding_mask.dtype}, wanted bool with True at real tokens")
    if tuple(padding_mask.shape) != (batch, tokens):
        raise PackingError(f"padding_mask has shape {list(padding_mask.shape)}, wanted [B={batch}, T={tokens}]")
    if checks_values(padding_mask) and tokens > 0:
        starts = padding_mask[:, :1].long().sum(1) + (padding_mask[:, 1:] & ~padding_mask[:, :-1]).sum(1)
        if bool((starts > 1).any()):
            row = int((starts > 1).nonzero()[0])
            raise PackingError(f"padding_mask row {row} has a hole: real tokens must be one contiguous run")


def _short(values: list[int]) -> str:
    shown = ", ".join(str(v) for v in values[:6])
    return f"[{shown}, ...]" if len(values) > 6 else f"[{shown}]"

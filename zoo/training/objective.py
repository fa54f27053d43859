"""What a model is trained to predict, as pairs of inputs and targets: the next byte, or masked bytes."""

from __future__ import annotations

import torch
from torch import Tensor

MASKED_SHARE = 0.15  # Devlin et al. 2019 (1810.04805); all of them become the mask token
NO_TARGET = -100  # what cross entropy leaves out
NEXT, MASKED = "bits_per_byte", "bits_per_masked_byte"  # two measures, never to be compared


def next_bytes(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the next-byte objective. windows: int64 [B, T + 1]. Returns [B,T] twice."""
    return windows[:, :-1], windows[:, 1:]


def masked_bytes(windows: Tensor, mask_token: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs with masked places, and targets at those places alone.

    windows: int64 [B, T + 1], the last byte unused, so that both objectives see as much text.
    mask_token: what stands at `MASKED_SHARE` of the T places of each window (rounded, at least one).
    generator: draws the places; on the device of `windows`. Returns [B,T] twice, NO_TARGET where nothing is masked.
    """
    tokens = windows[:, :-1]
    count = max(1, round(MASKED_SHARE * tokens.shape[1]))
    order = torch.rand(tokens.shape, generator=generator, device=tokens.device).argsort(dim=1, stable=True)
    masked = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, order[:, :count], True)
    return tokens.masked_fill(masked, mask_token), tokens.masked_fill(~masked, NO_TARGET)


def in_words(measure: str) -> str:
    """`bits per byte` or `bits per masked byte`."""
    return measure.replace("_", " ")

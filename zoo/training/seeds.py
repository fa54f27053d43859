"""Random numbers as a pure function of (seed, step, purpose), so that a resumed run draws the same ones."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, step: int, purpose: str) -> int:
    """A seed in [0, 2^63) that differs with any of the three."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def derived_generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, step, purpose))

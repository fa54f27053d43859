"""Which implementation served each operator of a mixer's call, and why each faster one did not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sequence_mixer.mixer import SequenceMixer
from zoo.ops.dispatch import Dispatch, record_dispatch


@dataclass(frozen=True)
class Explanation:
    """The choices of one forward call, in order; prints as one line per operator."""

    mixer: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    choices: tuple[Dispatch, ...]

    def __str__(self) -> str:
        lines = [f"{self.mixer} on {self.device}, {self.dtype}, input {list(self.shape)}"]
        for choice in self.choices:
            lines.append(f"  {choice.op}: {choice.backend}")
            lines.extend(f"      not {name}: {why}" for name, why in choice.reasons.items())
        if not self.choices:
            lines.append("  no operator of zoo.ops was called: the mixer is plain PyTorch")
        return "\n".join(lines)


def explain(mixer: SequenceMixer, x: Tensor) -> Explanation:
    """Run `mixer.forward(x)` once, with gradients if they are enabled, and tell what served it.

    x: [B,T,D]. Raises what the forward call raises.
    """
    with record_dispatch() as record:
        mixer(x)
    return Explanation(mixer.name, tuple(x.shape), x.dtype, x.device, tuple(record))

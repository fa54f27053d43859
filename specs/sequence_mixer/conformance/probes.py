"""What a check works on: one example config of a mixer on one device in one dtype, and inputs for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sequence_mixer.config import MixerConfig
from sequence_mixer.conformance.catalogue import CheckFailed, CheckSkipped
from sequence_mixer.definition import BackendSpec, Capabilities, MixerDef
from sequence_mixer.mixer import SequenceMixer

DEFAULT_CHUNK = 64  # where the config names no chunk_size


@dataclass(frozen=True)
class Subject:
    """A mixer as the checks see it. definition and example say which, device and dtype where and how it runs."""

    definition: MixerDef
    example: str
    config: MixerConfig
    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def capabilities(self) -> Capabilities:
        """Those of the example's config."""
        return self.definition.capabilities_of(self.config)

    @property
    def max_length(self) -> int | None:
        """Longest input the config serves; None if there is no limit."""
        limit = getattr(self.config, "max_length", None) if self.capabilities.max_length else None
        return None if limit is None else int(limit)

    @property
    def chunk(self) -> int:
        """Chunk length that the config names, or a usual one."""
        chunk = getattr(self.config, "chunk_size", None)
        return chunk if isinstance(chunk, int) else DEFAULT_CHUNK

    def length(self, wanted: int) -> int:
        """`wanted` tokens, or as many as the config serves."""
        return wanted if self.max_length is None else min(wanted, self.max_length)

    def needs_tokens(self, least: int) -> None:
        """Skip the check if the config serves fewer than `least` tokens."""
        if self.length(least) < least:
            raise CheckSkipped(f"needs {least} tokens, max_length is {self.max_length}")

    def build(self, seed: int = 0) -> SequenceMixer:
        """A new mixer on the subject's device, in its dtype; the same parameters for the same seed.

        Every parameter is moved a little from its initial value, because zeros and ones hide mistakes; the values
        are rounded to float32 (or the subject's dtype, if that is narrower).
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mixer = self.definition.make(self.config)
            with torch.no_grad():
                for parameter in mixer.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, dtype=torch.float32))
        return mixer.to(device=self.device, dtype=self.dtype)

    def built_raw(self, seed: int = 0) -> SequenceMixer:
        """A new mixer exactly as its definition makes it, on the CPU."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.definition.make(self.config)

    def input(self, batch: int, tokens: int, *, seed: int = 1, scale: float = 1.0) -> Tensor:
        """Random x [batch, tokens, D], the same for the same arguments on every device."""
        return self.random((batch, tokens, self.config.d_model), seed=seed, scale=scale)

    def random(self, shape: Sequence[int], *, seed: int, scale: float = 1.0) -> Tensor:
        """Normal numbers rounded to bfloat16, so that every dtype holds the same values."""
        source = torch.Generator().manual_seed(seed)
        values = torch.randn(*shape, generator=source) * scale
        return values.bfloat16().to(device=self.device, dtype=self.dtype)

    def at(self, dtype: torch.dtype) -> Subject:
        """The same subject in another dtype."""
        return replace(self, dtype=dtype)

    def fail(self, message: str) -> None:
        """Raise CheckFailed with the mixer's name in front."""
        raise CheckFailed(f"{self.name}: {message}")

    def require(self, condition: bool, message: str) -> None:
        """Fail unless `condition`."""
        if not condition:
            self.fail(message)

    def causality_tolerance(self, tokens: int, outputs: Tensor) -> float:
        """Largest change that does not count as a leak: 0, or the rounding of a transform where one is declared."""
        if not any(spec.name == "fft" for spec in self.capabilities.backends):
            return 0.0
        eps = torch.finfo(self.dtype).eps
        return float(4 * eps * torch.log2(torch.tensor(2.0 * tokens)) * outputs.detach().abs().max())


def why_unusable(spec: BackendSpec, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a declared backend cannot run here, or None if it can."""
    for package in spec.needs:
        if find_spec(package) is None:
            return f"needs the package {package!r}"
    interpreted = device.type == "cpu" and "triton" in spec.needs and os.environ.get("TRITON_INTERPRET", "0") == "1"
    if "*" not in spec.devices and device.type not in spec.devices and not interpreted:
        return f"runs on {', '.join(spec.devices)}"
    kind = str(dtype).removeprefix("torch.")
    return None if kind in spec.dtypes else f"takes {', '.join(spec.dtypes)}"


def reference_backend(capabilities: Capabilities) -> str:
    """Name of the backend that is the definition: "reference", or the last one declared."""
    names = [spec.name for spec in capabilities.backends]
    return "reference" if "reference" in names or not names else names[-1]


def plain_backend(capabilities: Capabilities) -> str:
    """Name of the plain PyTorch backend whose error sets the allowance: "chunked" if there is one."""
    plain = [spec.name for spec in capabilities.backends if not spec.needs and "*" in spec.devices]
    for name in ("chunked", "fft"):
        if name in plain:
            return name
    others = [name for name in plain if name != "reference"]
    return others[0] if others else reference_backend(capabilities)


def run_pieces(
    mixer: SequenceMixer, x: Tensor, pieces: Sequence[int], state: Any = None, *, donate: bool = False
) -> tuple[Tensor, Any]:
    """`extend` over consecutive pieces of x, from `state` or the empty state. Returns outputs and the last state."""
    if state is None:
        state = mixer.initial_state(x.shape[0])
    outputs = []
    for piece in x.split(list(pieces), dim=1):
        y, state = mixer.extend(piece, state, donate=donate)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def boundaries(lengths: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_seqlens [S+1] of packed sequences of these lengths."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device, dtype=dtype)

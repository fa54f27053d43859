"""Two tiny mixers, registered as an installed distribution would be, for tests of what stands around mixers."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sequence_mixer import Capabilities, Cost, MixerConfig, MixerDef, SequenceMixer, State, hookimpl
from sequence_mixer.config import Count

NAMES = ("small_decay", "small_mean")


class SmallConfig(MixerConfig):
    name: Literal["small_decay", "small_mean"] = "small_decay"
    causal: bool = True
    stateful: bool = True
    max_length: Count | None = None
    share: bool = False
    redraw: bool = False
    bad_hint: bool = False
    decay: float = 0.9


class SmallState(State):
    total: Tensor  # [B, D]


class SmallMixer(SequenceMixer):
    """y_t = out(sum over s <= t (or all s) of decay^|t-s| in(x_s)), one [D, D] matrix in and one out."""

    def __init__(self, config: SmallConfig, shared: MutableMapping[str, Any]) -> None:
        super().__init__(config, capabilities_of(config))
        width = config.d_model
        self.into = nn.Linear(width, width)
        own = nn.Linear(width, width, bias=False)
        self.out = shared.setdefault("small/out", own) if config.share else own
        self.register_buffer("scale", torch.ones(width))
        self.calls: list[int] = []
        self.seeds: list[int | None] = []

    def mix(self, x: Tensor, state: Any, *, cu_seqlens: Any, padding_mask: Any, donate: bool) -> tuple[Tensor, Any]:
        u, tokens = self.into(x) * self.scale, x.shape[1]
        place = torch.arange(tokens)
        distance = place[:, None] - place[None, :]
        weights = self.config.decay ** distance.abs().to(u.dtype)
        if self.config.causal:
            weights = weights * (distance >= 0)
        if cu_seqlens is not None:
            segment = torch.bucketize(place, cu_seqlens[1:].long(), right=True)
            weights = weights * (segment[:, None] == segment[None, :])
            mixed = torch.einsum("ts,bsd->btd", weights, u)
            ends = torch.stack(
                [
                    mixed[0, end - 1] if end > start else mixed.new_zeros(x.shape[2])
                    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist())
                ]
            )
            return self.out(mixed), SmallState(ends)
        mixed = torch.einsum("ts,bsd->btd", weights, u)
        if state is not None:
            mixed = mixed + self.config.decay ** (place + 1).to(u.dtype)[:, None] * state.total[:, None]
        return self.out(mixed), SmallState(mixed[:, -1])

    def empty_state(self, batch_size: int, capacity: Any, device: Any, dtype: Any) -> SmallState:
        return SmallState(torch.zeros(batch_size, self.config.d_model, device=device, dtype=dtype))

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        return Cost(0, 0, sum(p.numel() for p in self.parameters()), self.config.d_model)

    def parameter_groups(self) -> Mapping[str, dict[str, float]]:
        if self.config.bad_hint:
            return {"inot.weight": {"lr_scale": 1.0}}
        return {"into.weight": {"weight_decay": 0.0, "lr_scale": 0.5}}

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        self.calls.append(step)
        self.seeds.append(None if generator is None else generator.initial_seed())
        if self.config.redraw:
            self.scale.copy_(1 + 0.1 * torch.randn(self.scale.shape, generator=generator))


def capabilities_of(config: SmallConfig) -> Capabilities:
    return Capabilities(
        causal=config.causal,
        bidirectional=not config.causal,
        stateful=config.stateful and config.causal,
        varlen=True,
        padding_mask=True,
        max_length=config.max_length is not None,
    )


@hookimpl
def zoo_register_mixers() -> list[MixerDef]:
    return [
        MixerDef(name=name, config=SmallConfig, build=SmallMixer, capabilities_of=capabilities_of,
                 examples={"default": {"d_model": 64}})
        for name in NAMES
    ]  # fmt: skip

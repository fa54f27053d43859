"""Small mixers of every kind that a comparison meets: quick, not causal, limited in length, slow, and raising."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sequence_mixer import Cost, MixerConfig, MixerDef, hookimpl
from sequence_mixer.config import Count
from small_mixers import SmallConfig, SmallMixer, capabilities_of

NAMES = (
    "bench_plain", "bench_both_sides", "bench_limited", "bench_raises", "bench_slow", "bench_unbuildable",
    "bench_never_causal",
)  # fmt: skip
SLOW = 0.1  # seconds of a call


class PlainConfig(SmallConfig):
    name: Literal["bench_plain", "bench_limited", "bench_raises", "bench_slow", "bench_unbuildable"] = "bench_plain"  # type: ignore[assignment]


class BothSidesConfig(PlainConfig):
    name: Literal["bench_both_sides"] = "bench_both_sides"  # type: ignore[assignment]
    causal: bool = False
    stateful: bool = False


class LimitedConfig(PlainConfig):
    name: Literal["bench_limited"] = "bench_limited"  # type: ignore[assignment]
    max_length: Count = 16


class UnbuildableConfig(PlainConfig):
    name: Literal["bench_unbuildable"] = "bench_unbuildable"  # type: ignore[assignment]
    d_model: Literal[32]


class NeverCausalConfig(MixerConfig):
    name: Literal["bench_never_causal"] = "bench_never_causal"
    causal: ClassVar[bool] = False
    share: ClassVar[bool] = False
    redraw: ClassVar[bool] = False
    bad_hint: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    max_length: ClassVar[None] = None
    decay: float = 0.9


class Plain(SmallMixer):
    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        parameters = sum(p.numel() for p in self.parameters())
        return Cost(4 * batch_size * length * self.config.d_model**2, 4 * parameters, parameters, self.config.d_model)


class Raises(Plain):
    def mix(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        if x.shape[1] > 8:
            raise ValueError("more than eight\ntokens are too many")
        return super().mix(x, state, **options)


class Slow(Plain):
    def mix(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        time.sleep(SLOW)
        return super().mix(x, state, **options)


@hookimpl
def zoo_register_mixers() -> list[MixerDef]:
    configs = (
        PlainConfig, BothSidesConfig, LimitedConfig, PlainConfig, PlainConfig, UnbuildableConfig, NeverCausalConfig,
    )  # fmt: skip
    builders = (Plain, Plain, Plain, Raises, Slow, Plain, Plain)
    return [
        MixerDef(
            name=name, config=config, build=build, capabilities_of=capabilities_of,
            examples={"default": {"d_model": 32}},
        )
        for name, config, build in zip(NAMES, configs, builders, strict=True)
    ]  # fmt: skip

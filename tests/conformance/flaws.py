"""Where deliberately broken mixers are entered: one flaw each, with the check that is meant to catch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sequence_mixer import Capabilities, MixerConfig, MixerDef

from .toys import ToyConfig, define


@dataclass(frozen=True)
class Flaw:
    """A broken mixer: its name, the id of the check meant for it, and a word of the message it gets."""

    name: str
    check: str
    says: str
    definition: MixerDef


FLAWS: list[Flaw] = []


def caught_by(
    check: str,
    says: str,
    *,
    config: type[MixerConfig] = ToyConfig,
    capabilities: Capabilities | None = None,
    name: str = "",
    example: dict[str, object] | None = None,
) -> Callable[[Any], Any]:
    """Enter a class as a mixer that `check` catches with a message that contains `says`."""

    def enter(mixer: Any) -> Any:
        definition = define(mixer, config=config, capabilities=capabilities)
        if example is not None:
            definition = MixerDef(
                name=definition.name,
                config=config,
                build=definition.build,
                examples={"default": {"d_model": 64, **example}},
                capabilities_of=definition.capabilities_of,
            )
        FLAWS.append(Flaw(name or getattr(mixer, "__name__", "mixer"), check, says, definition))
        return mixer

    return enter

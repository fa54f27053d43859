"""How the contract asks the host for mixers by name without importing it.

The host (the registry) announces itself in the entry-point group `sequence_mixer.host`; the contract loads that
object when a name has to be resolved and not before, so `import sequence_mixer` needs no host.
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol, cast

from sequence_mixer.errors import MixerError, RegistryError

if TYPE_CHECKING:
    from sequence_mixer.definition import MixerDef


class Host(Protocol):
    """What the contract needs from a registry."""

    def names(self) -> list[str]: ...

    def definition(self, name: str) -> MixerDef: ...


@functools.cache
def host() -> Host:
    """The installed registry. Raises RegistryError if there is none, or more than one."""
    found = list(entry_points(group="sequence_mixer.host"))
    if len(found) != 1:
        named = ", ".join(entry.value for entry in found) or "none"
        raise RegistryError(f"resolving a mixer by name needs one installed registry, found {named}; install mixer-zoo")
    return cast("Host", found[0].load())


def mixers_with(capability: str) -> list[str]:
    """Names of the registered mixers whose default config declares `capability`; empty without a registry."""
    names = []
    try:
        known = host().names()
    except RegistryError:
        return []
    for name in known:
        try:
            if host().definition(name).capabilities.has(capability):
                names.append(name)
        except MixerError:
            continue  # a plugin that does not load has no capabilities; `zoo plugins` says why
    return names

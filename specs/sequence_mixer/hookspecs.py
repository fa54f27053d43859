"""The one hook a plugin implements, and the version of the contract it is written for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from sequence_mixer.definition import MixerDef

PROJECT = "zoo"
CONTRACT = (1, 0)  # major: breaking changes; minor: additions

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def zoo_register_mixers() -> Sequence[MixerDef]:  # type: ignore[empty-body]
    """Return the definitions of the mixers of this package.

    The names must be exactly those that the distribution's entry points in the group `zoo.mixers` give to this
    package. Keep the module light: import the config, and import torch code inside `build`.
    """

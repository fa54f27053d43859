"""Error types of the contract.

Every message names the argument, what came, what was wanted and the next step, so that a user never has to
read our code to understand one. `MixerError` is the common base: a program catches it to print one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class MixerError(Exception):
    """Base of all errors that the contract, the operators and the host raise on purpose."""


class ShapeError(MixerError, ValueError):
    """A tensor has the wrong number of axes or a size that disagrees with another argument."""


class DtypeError(MixerError, TypeError):
    """A tensor has a dtype that the call does not take, or that disagrees with the parameters."""


class DeviceError(MixerError, RuntimeError):
    """Tensors or parameters of one call live on different devices."""


class LengthError(MixerError, ValueError):
    """A sequence is longer than the mixer's `max_length`, or has a length that it cannot serve."""


class PackingError(MixerError, ValueError):
    """`cu_seqlens` or `padding_mask` is malformed, or both came at once."""


class StateError(MixerError, ValueError):
    """A state does not fit the call: wrong type, wrong batch, or no room left."""


class ConfigError(MixerError, ValueError):
    """A config is not valid: unknown key, wrong type, or fields that contradict each other."""


class ReferenceMismatch(MixerError, ValueError):
    """A reference module was built with an option that our mixer does not reproduce."""


class BackendError(MixerError, RuntimeError):
    """The implementation asked for does not exist, is not installed, or cannot serve the call."""


class RegistryError(MixerError, RuntimeError):
    """A plugin broke a rule of the registry: duplicate name, unsupported contract, wrong names from its hook."""


class UnknownMixer(MixerError, LookupError):
    """No mixer of that name is registered."""


class UnsupportedCapability(MixerError, NotImplementedError):
    """A mixer was asked for something that its capabilities do not declare.

    mixer: name of the mixer that was asked.
    capability: field of `Capabilities` that is not declared ("stateful", "varlen", ...).
    reason: optional sentence saying why this mixer cannot have it.
    """

    def __init__(self, mixer: str, capability: str, reason: str = "") -> None:
        from sequence_mixer.host import mixers_with

        self.mixer, self.capability, self.reason = mixer, capability, reason
        have = [name for name in mixers_with(capability) if name != mixer]
        message = f"mixer {mixer!r} does not support {capability!r}"
        message += f": {reason}" if reason else " with this config"
        if have:
            message += f"; mixers that do: {', '.join(have)}"
        super().__init__(message)

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.mixer, self.capability, self.reason)


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def unknown_name(kind: str, word: str, known: Sequence[str]) -> str:
    """One sentence for a name that is not in `known`: `no mixer named 'x'; did you mean y? registered: ...`."""
    hint = suggest(word, known)
    return f"no {kind} named {word!r}{hint or ';'} registered: {', '.join(known) or 'none'}"

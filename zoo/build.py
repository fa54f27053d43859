"""From a name, a mapping or a file to a mixer: look up, validate, build."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from sequence_mixer.config import MixerConfig
from sequence_mixer.definition import MixerDef
from sequence_mixer.errors import BackendError, ConfigError, ReferenceMismatch, suggest
from sequence_mixer.mixer import SequenceMixer
from zoo.config_file import in_words, read_config_file
from zoo.registry import registry


def create(
    mixer: str | os.PathLike[str] | Mapping[str, Any] | MixerConfig,
    *,
    backend: str = "auto",
    shared: MutableMapping[str, Any] | None = None,
    **options: Any,
) -> SequenceMixer:
    """Build a mixer.

    mixer: a registered name; a mapping with a `name`; a config; or the path of a YAML or JSON file with such a mapping.
    backend: "auto", or one of the mixer's backends, which then serves every operator call or raises.
    shared: one mapping for all layers of a model, for mixers that share modules between layers.
    options: fields of the config, over those of `mixer`.
    Raises UnknownMixer, RegistryError, ConfigError (unknown key, wrong type), BackendError.
    """
    config = resolve(mixer, **options)
    definition = registry.definition(config.name)
    built = definition.make(config, shared)
    known = ["auto", *(spec.name for spec in built.capabilities.backends)]
    if backend not in known:
        raise BackendError(
            f"{config.name} has no backend {backend!r}{suggest(backend, known)}; it has: {', '.join(known)}"
        )
    built.backend = backend
    return built


def resolve(mixer: str | os.PathLike[str] | Mapping[str, Any] | MixerConfig, **options: Any) -> MixerConfig:
    """The validated config that the arguments of `create` stand for."""
    if isinstance(mixer, MixerConfig):
        return mixer.model_copy(update=options) if options else mixer
    if isinstance(mixer, os.PathLike) or (isinstance(mixer, str) and mixer.endswith((".yaml", ".yml", ".json"))):
        mixer = read_config_file(Path(mixer))
    try:
        fields = {"name": mixer} if isinstance(mixer, str) else dict(mixer)
    except (TypeError, ValueError):
        came = type(mixer).__name__
        raise ConfigError(f"the mixer is a {came}, wanted a name, a mapping, a config, or a file's path") from None
    fields.update(options)
    if not isinstance(fields.get("name"), str):
        raise ConfigError(f"a mixer config needs a 'name', got the keys {', '.join(map(str, fields)) or 'none'}")
    definition = registry.definition(fields["name"])
    try:
        return definition.config.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(in_words(f"{definition.name} config", definition.config, error)) from None


def from_reference(name: str, peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> SequenceMixer:
    """A mixer equal to a reference module and holding its weights.

    name: registered mixer. peer: the reference class, as the mixer's README lists it ("Mamba2", ...).
    config: the reference's own constructor arguments. state_dict: its weights, under its own names.
    The mixer takes the dtype of the weights.
    Raises ReferenceMismatch if the peer is unknown or an option is not reproduced, ConfigError, UnknownMixer.
    """
    definition: MixerDef = registry.definition(name)
    if definition.from_reference is None:
        raise ReferenceMismatch(f"mixer {name!r} reads no reference modules")
    ours, weights = definition.from_reference(peer, config, state_dict)
    mixer = definition.make(ours)
    for weight in weights.values():
        if weight.is_floating_point():
            mixer = mixer.to(device=weight.device, dtype=weight.dtype)
            break
    try:
        mixer.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ReferenceMismatch(f"{name} from {peer}: the weights do not fit: {error}") from None
    return mixer

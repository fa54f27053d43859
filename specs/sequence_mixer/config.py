"""Configs of mixers: frozen, strict about whole numbers, and closed to unknown keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    StrictInt,
    model_serializer,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from sequence_mixer.errors import MixerError
from sequence_mixer.host import host

Count = Annotated[StrictInt, Field(gt=0)]  # a whole number >= 1; 64.0 and "64" are refused


class MixerConfig(BaseModel):
    """Base of every mixer's config. A subclass adds `name: Literal["..."] = "..."` and its own fields.

    Unknown keys are refused, whole numbers are strict, infinities are strings in JSON, and `model_copy(update=)`
    validates. An option with a shared meaning has the shared name in every mixer (see the contract, SM-12).
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_inf_nan="strings", validate_default=True, protected_namespaces=()
    )

    name: str
    d_model: Count = Field(description="model channels, D")

    @model_serializer(mode="wrap")
    def _infinities_as_strings(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """`ser_json_inf_nan` alone reaches neither `model_dump(mode="json")` nor a config inside another model."""
        fields: dict[str, Any] = handler(self)
        return _json_ready(fields) if info.mode_is_json() else fields

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields replaced; the result is validated like a new config."""
        return type(self).model_validate({**self.model_dump(), **(update or {})})


def _json_ready(value: Any) -> Any:
    """`value` with every infinity or nan in it as the string that pydantic reads back."""
    if isinstance(value, dict):
        return {key: _json_ready(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class _ResolvedByName:
    """Validates a mapping with a `name` through the registry, and a MixerConfig as itself."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            resolve_config,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda config, info: config.model_dump(mode=info.mode), info_arg=True
            ),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        registry = host()
        options = []
        for name in registry.names():
            try:
                options.append(registry.definition(name).config.model_json_schema())
            except MixerError:
                continue  # a plugin that does not load offers no config; `zoo plugins` says why
        return {"oneOf": options}


def resolve_config(value: Any) -> MixerConfig:
    """The config that `value` stands for: a MixerConfig, or a mapping whose `name` is registered.

    Raises PydanticCustomError (a part of ValidationError) if the name is missing or unknown, ValidationError if
    the fields are wrong.
    """
    if isinstance(value, MixerConfig):
        return value
    if not isinstance(value, Mapping):
        raise PydanticCustomError(
            "mixer_config", "a mixer config is a mapping with a 'name', got {kind}", {"kind": type(value).__name__}
        )
    if "name" not in value:
        raise PydanticCustomError(
            "mixer_name", "a mixer config needs a 'name', got the keys {keys}", {"keys": ", ".join(map(str, value))}
        )
    try:
        definition = host().definition(str(value["name"]))
    except MixerError as error:
        raise PydanticCustomError("mixer_name", "{why}", {"why": str(error)}) from error
    return definition.config.model_validate(dict(value))


AnyMixerConfig = Annotated[MixerConfig, _ResolvedByName()]

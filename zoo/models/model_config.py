"""The config of a model: one mixer config per layer, and what stands around the mixers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sequence_mixer.config import AnyMixerConfig, Count
from sequence_mixer.errors import ConfigError
from zoo.config_file import in_words
from zoo.models.pattern import expand_layers


class ModelConfig(BaseModel):
    """Config of a model. `layers` may come as a pattern beside `mixers`; it is stored expanded, one config per layer.

    `ModelConfig.of(d_model=64, layers="ssd*3, wide", mixers={"wide": {"name": "ssd", "d_state": 128}})` raises
    ConfigError in words; the plain constructor raises pydantic's ValidationError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    extra_keys: ClassVar[tuple[str, ...]] = ("mixers",)

    d_model: Count = Field(description="model channels, D")
    layers: Annotated[tuple[AnyMixerConfig, ...], Field(min_length=1, description="one mixer config per layer")]
    vocab_size: Count = Field(256, description="number of tokens; 256 for bytes")
    mlp_ratio: float = Field(2.0, ge=0, le=64, description="hidden width of the gated MLP over d_model; 0 for no MLP")
    norm_eps: float = Field(1e-5, gt=0, description="added to the mean square in RMSNorm")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability, on the output of each mixer and MLP")
    tie_embeddings: bool = Field(True, description="the output projection is the embedding")
    objective: Literal["next", "masked"] | None = Field(
        None,
        description="what is predicted: the next token, or masked ones from both sides; masked if null and a layer is "
        "not causal, else next",
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, fields: Any) -> Any:
        """Replace `layers` and `mixers` by one config per layer, if d_model is fit to build them."""
        if not isinstance(fields, Mapping):
            return fields
        expanded = dict(fields)
        mixers, layers, d_model = expanded.pop("mixers", None), expanded.get("layers"), expanded.get("d_model")
        if mixers is not None and not isinstance(mixers, Mapping):
            raise ConfigError(f"mixers is a {type(mixers).__name__}, wanted a mapping of names to config fields")
        if layers is None or type(d_model) is not int or d_model < 1:
            return expanded  # the fields' own checks speak
        if not isinstance(layers, (str, list, tuple)):
            raise ConfigError(f"layers is a {type(layers).__name__}, wanted a pattern (text) or a list")
        expanded["layers"] = tuple(expand_layers(layers, mixers or {}, d_model))
        return expanded

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """The config with these fields. Raises ConfigError in words."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise ConfigError(in_words("model config", cls, error)) from None

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP; 0 for none."""
        return round(self.mlp_ratio * self.d_model)

    @property
    def masked(self) -> bool:
        """True if the model predicts masked tokens: it is asked to, or a layer sees what comes next."""
        if self.objective is not None:
            return self.objective == "masked"
        return not all(_capabilities(layer).causal for layer in self.layers)


def refuse_future_readers(config: ModelConfig) -> None:
    """Raise ConfigError if a model of next tokens has a layer that is not causal: it would read what it predicts."""
    if config.masked:
        return
    for index, layer in enumerate(config.layers):
        if not _capabilities(layer).causal:
            advice = "set causal: true" if "causal" in type(layer).model_fields else "take a causal mixer"
            raise ConfigError(
                f"layer {index} ({layer.name}) is not causal: with objective: next the model would see the tokens that "
                f"it has to predict; {advice}, or objective: masked"
            )


def refuse_masked(config: ModelConfig) -> None:
    """Raise ConfigError if the model predicts masked tokens: what it says of the next one means nothing."""
    if config.masked:
        raise ConfigError(
            "this model predicts masked bytes from both sides and cannot go on from a text; "
            "train one of causal layers with objective: next to generate"
        )


def refuse_longer_than_limits(config: ModelConfig, tokens: int, what: str) -> None:
    """Raise ConfigError if `tokens` are more than some layer's max_length. what: what has that many tokens."""
    for index, layer in enumerate(config.layers):
        limit = getattr(layer, "max_length", None)
        if _capabilities(layer).max_length and limit is not None and tokens > limit:
            raise ConfigError(
                f"layer {index} ({layer.name}) has max_length={limit}, {what} has {tokens} tokens; "
                "raise max_length or take fewer tokens"
            )


def refuse_stateless(config: ModelConfig) -> None:
    """Raise UnsupportedCapability if a layer has no state to generate from."""
    from sequence_mixer.errors import UnsupportedCapability

    for index, layer in enumerate(config.layers):
        if not _capabilities(layer).stateful:
            raise UnsupportedCapability(
                layer.name, "stateful", f"it is layer {index} of the model, which extends sequences token by token"
            )


def _capabilities(layer: Any) -> Any:
    from sequence_mixer.host import host

    return host().definition(layer.name).capabilities_of(layer)

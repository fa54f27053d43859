"""The config of a training run: the model, the data, the optimiser."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from sequence_mixer.config import Count
from sequence_mixer.errors import ConfigError
from zoo.config_file import in_words, read_config_file
from zoo.models.model_config import ModelConfig, refuse_future_readers, refuse_longer_than_limits

Natural = Annotated[StrictInt, Field(ge=0)]
_MODEL_KEYS = (*ModelConfig.model_fields, *ModelConfig.extra_keys)


class TrainConfig(BaseModel):
    """Everything that decides the numbers of a run. The keys of `model` may also stand at the top level of a file,
    `objective` beside `model` too.

    Two runs with equal configs on one machine give the same numbers bit for bit, interrupted or not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    extra_keys: ClassVar[tuple[str, ...]] = ("objective",)

    model: ModelConfig
    corpus: str | None = Field(
        None, description="folder or file, from the working directory; none for Python's library"
    )
    corpus_files: str = Field("", description="pattern of file names in a folder; '' for all")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of files (of the bytes, for one file) held out")
    context: Count = Field(256, description="tokens per window, T")
    batch_size: Count = Field(16, description="windows per step, B")
    steps: Count = Field(200, description="optimiser steps")
    learning_rate: float = Field(2e-3, gt=0, description="peak, after warm-up")
    final_lr_ratio: float = Field(0.1, ge=0, le=1, description="learning rate at the last step over the peak")
    warmup_steps: Natural = Field(20, description="steps over which the learning rate rises linearly")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's; norms, biases and embeddings have none")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    grad_clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 for no clipping")
    seed: Natural = Field(0, description="of initial values, data order, dropout and redraws", lt=2**63)
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        "float32", description="bfloat16: parameters in float32, computation under autocast"
    )
    device: str = Field("auto", description="'cpu', 'cuda', 'cuda:1', ...; 'auto' for cuda where there is one")
    eval_every: Natural = Field(100, description="steps between held-out evaluations; 0 for one at the end")
    eval_windows: Count = Field(32, description="held-out windows, always the same")
    checkpoint_every: Count = Field(50, description="steps between checkpoints; one more at the end")

    @model_validator(mode="before")
    @classmethod
    def _gather_model(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            return fields
        if "objective" in fields and isinstance(fields.get("model"), Mapping):
            if "objective" in fields["model"]:
                raise ConfigError("objective is given twice, at the top and in model; leave one out")
            rest = {key: value for key, value in fields.items() if key != "objective"}
            return {**rest, "model": {**fields["model"], "objective": fields["objective"]}}
        if "model" not in fields and "layers" in fields:
            rest = {key: value for key, value in fields.items() if key not in _MODEL_KEYS}
            return {**rest, "model": {key: fields[key] for key in _MODEL_KEYS if key in fields}}
        return fields

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.model.vocab_size < 256:
            raise ConfigError(f"vocab_size={self.model.vocab_size}: training is on bytes and needs 256")
        refuse_future_readers(self.model)
        refuse_longer_than_limits(self.model, self.context, "the context")
        return self

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """The config with these fields. Raises ConfigError in words."""
        return cls._validated("train config", fields)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **overrides: Any) -> Self:
        """The config in a YAML or JSON file; `overrides` that are not None win. Raises ConfigError in words."""
        given = {key: value for key, value in overrides.items() if value is not None}
        return cls._validated(os.fspath(path), {**read_config_file(path), **given})

    @classmethod
    def _validated(cls, title: str, fields: Mapping[str, Any]) -> Self:
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            raise ConfigError(in_words(title, cls, error)) from None

    def on_device(self) -> Self:
        """The same config with the device settled: 'auto' resolved, and what is named there to be used.

        Raises ConfigError if torch does not know the device or cannot use it.
        """
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"device={name!r} cannot be used here: {reason}; take cpu or another device") from None
        if device.type == "meta":
            raise ConfigError("device='meta' holds no numbers; take cpu or cuda")
        return self.model_copy(update={"device": name})

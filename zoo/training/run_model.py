"""The model of a training run, read back from its folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sequence_mixer.errors import ConfigError
from zoo.models.language_model import LanguageModel
from zoo.training.checkpoint import CheckpointError, load_newest, restore
from zoo.training.run_folder import CHECKPOINTS
from zoo.training.train_config import TrainConfig


def load_run(path: str | os.PathLike[str], *, device: str = "cpu") -> tuple[LanguageModel, TrainConfig, int]:
    """Model (evaluation mode), config and step of the newest checkpoint in a run's folder.

    Raises CheckpointError if there is none or it is corrupt, ConfigError if its config is not served here.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"no run folder {folder}; give the --out of a `zoo train`")
    checkpoint = load_newest(folder / CHECKPOINTS)
    if checkpoint is None:
        raise CheckpointError(f"{folder} has no checkpoint; train first: zoo train CONFIG.yaml --out {folder}")
    try:
        config = TrainConfig.of(**{**checkpoint.config, "device": device}).on_device()
    except ConfigError as error:
        raise ConfigError(f"the config of the run {folder} is not served here: {error}") from None
    with torch.random.fork_rng(devices=[]):
        model = LanguageModel(config.model).to(dtype=torch.float64 if config.dtype == "float64" else torch.float32)
    restore(checkpoint, model)
    return model.to(config.device).eval(), config, checkpoint.step

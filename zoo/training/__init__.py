"""Training of language models: configs, the loop, checkpoints that survive a kill, held-out evaluation."""

from zoo.training.loop import StepReport, TrainingError, TrainResult, train_language_model
from zoo.training.train_config import TrainConfig

__all__ = ["StepReport", "TrainConfig", "TrainResult", "TrainingError", "train_language_model"]

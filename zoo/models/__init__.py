"""Models made of any registered mixers: configs, layer patterns, blocks, and the language model."""

from zoo.models.language_model import LanguageModel
from zoo.models.model_config import ModelConfig
from zoo.models.model_state import ModelState
from zoo.models.pattern import expand_layers, parse_pattern

__all__ = ["LanguageModel", "ModelConfig", "ModelState", "expand_layers", "parse_pattern"]

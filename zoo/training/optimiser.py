"""AdamW that honours the mixers' hints, and the learning rate over time."""

from __future__ import annotations

import math

import torch
from torch import nn

from sequence_mixer.errors import ConfigError, suggest
from zoo.models.language_model import LanguageModel
from zoo.training.train_config import TrainConfig

HINTS = ("weight_decay", "lr_scale")


def make_optimiser(model: LanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `grouped_parameters`; each group carries its `lr_scale`."""
    groups = grouped_parameters(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=1e-8)


def grouped_parameters(model: LanguageModel, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups by (weight_decay, lr_scale), each parameter once.

    Matrices take `weight_decay`; vectors and scalars (norms, biases) and embeddings take none; a hint of a mixer's
    `parameter_groups()` wins over both, also for a parameter that several layers share.
    Raises ConfigError for a hint that is not known or not a number >= 0, or two that contradict each other.
    """
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    hints: dict[nn.Parameter, dict[str, float]] = {}
    for name, hint in model.parameter_groups().items():
        _check_hint(name, hint)
        known = hints.setdefault(everywhere[name], dict(hint))
        if known != hint:
            raise ConfigError(f"the shared parameter {name!r} has two hints that differ: {known} and {dict(hint)}")
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.dim() < 2 or parameter in embeddings
        hint = hints.get(parameter, {})
        key = (hint.get("weight_decay", 0.0 if plain else weight_decay), hint.get("lr_scale", 1.0))
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step 1..steps: a linear rise over `warmup_steps`, then half a cosine down to `final_lr_ratio`."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    share = config.final_lr_ratio + (1 - config.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * share


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its lr_scale."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["lr_scale"]


def _check_hint(name: str, hint: dict[str, float]) -> None:
    for key, value in hint.items():
        if key not in HINTS:
            raise ConfigError(
                f"unknown optimiser hint {key!r} for {name!r}{suggest(key, HINTS)}; hints: {', '.join(HINTS)}"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ConfigError(f"optimiser hint {key}={value!r} for {name!r}: wanted a number of 0 or more")

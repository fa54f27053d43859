"""A short training run on real text: enough to see that a mixer learns, not to rank mixers."""

from __future__ import annotations

from typing import Any

import torch

from sequence_mixer.errors import MixerError
from zoo.bench.cases import Sizes
from zoo.registry import registry


def smoke_run(name: str, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Train a two-layer byte model of this mixer for a few steps; bits per byte on held-out files.

    A mixer that cannot model language (not causal) gets a reason instead of a number.
    """
    from zoo.training import TrainConfig, train_language_model

    row: dict[str, Any] = {"mixer": name, "label": "smoke run: too short to rank mixers"}
    if not registry.definition(name).capabilities.causal:
        return {**row, "reason": "not causal"}
    fields = registry.definition(name).config.model_fields
    options: dict[str, Any] = {"name": name}
    if "max_length" in fields:
        options["max_length"] = sizes.train_context
    try:
        config = TrainConfig.of(
            model={"d_model": sizes.train_width, "layers": [options, options]},
            context=sizes.train_context,
            batch_size=8,
            steps=sizes.train_steps,
            warmup_steps=sizes.train_steps // 10,
            eval_every=0,
            device=str(device),
        )
        result = train_language_model(config)
    except MixerError as error:
        return {**row, "reason": str(error)}
    return {
        **row,
        "bits_per_byte": result.bits_per_byte,
        "steps": sizes.train_steps,
        "tokens_per_second": result.tokens_per_second,
        "losses": result.losses,
    }

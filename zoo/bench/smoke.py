"""A short training run on real text: enough to see that a mixer learns, not to rank mixers."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from sequence_mixer.errors import ConfigError
from zoo.bench.cases import Sizes, config_of
from zoo.bench.store import DONE, SKIPPED
from zoo.registry import registry
from zoo.tasks.text_corpus import Corpus

LABEL = "smoke run: too short to rank mixers"


class _TooSlow(Exception):
    """The run would take longer than it may. seconds: what it would take."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


def smoke_run(
    name: str, sizes: Sizes, device: torch.device, corpus: Corpus | None = None, limit: float = math.inf
) -> dict[str, Any]:
    """Train a two-layer byte model of this mixer for a few steps; bits per byte on held-out files.

    A mixer that is not causal by default is trained with `causal=True` if it has that option; one that has not
    predicts masked bytes, and its number is `bits_per_masked_byte`. One that would take longer than `limit` seconds
    gets a reason instead of a number.
    corpus: Python's standard library by default. Raises what a broken mixer raises.
    """
    from zoo.training import TrainConfig, train_language_model

    row: dict[str, Any] = {"mixer": name, "kind": "smoke run", "label": LABEL, "outcome": DONE}
    options = _layer(name, sizes)
    if limit <= 0:
        return {**row, "outcome": SKIPPED, "reason": "the time of the run is up"}
    try:
        config = TrainConfig.of(
            model={"d_model": sizes.train_width, "layers": [options, options]},
            context=sizes.train_context,
            batch_size=8,
            steps=sizes.train_steps,
            warmup_steps=sizes.train_steps // 10,
            learning_rate=4e-3,
            eval_every=0,
            device=str(device),
        )
    except ConfigError as error:
        return {**row, "reason": str(error)}
    first: list[float] = []  # when the first step was over; what came before it is paid once

    def judge(report: Any) -> None:
        now = time.monotonic()
        first.append(now)
        steps = report.step - 1
        if steps >= 2:  # one alone may be out of line
            foreseen = (now - first[0]) * report.steps / steps
            if foreseen > limit:
                raise _TooSlow(foreseen)

    try:
        result = train_language_model(config, judge, corpus=corpus)
    except _TooSlow as slow:
        told = f"{sizes.train_steps} steps take {slow.seconds:.0f} s, {limit:.0f} s are left for them"
        return {**row, "outcome": SKIPPED, "reason": told}
    return {
        **row,
        result.measure: result.bits,
        "steps": sizes.train_steps,
        "causal_by_option": "causal" in options,
        "tokens_per_second": result.tokens_per_second,
        "losses": result.losses,
    }


def _layer(name: str, sizes: Sizes) -> dict[str, Any]:
    """Config of a causal layer, or of one that sees both sides if the mixer has no other."""
    fields = registry.definition(name).config.model_fields
    options: dict[str, Any] = {"name": name}
    if "max_length" in fields:
        options["max_length"] = sizes.train_context
    default = config_of(name, sizes.train_width, sizes.train_context)
    if "causal" in fields and not registry.definition(name).capabilities_of(default).causal:
        options["causal"] = True
    return options

"""The training loop of a language model on bytes."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sequence_mixer.errors import MixerError
from zoo.durable import write_file
from zoo.models.language_model import LanguageModel
from zoo.tasks.text_corpus import Corpus, load_corpus
from zoo.training.checkpoint import Checkpoint, CheckpointError, restore, snapshot
from zoo.training.objective import MASKED, NEXT, NO_TARGET, in_words, masked_bytes, next_bytes
from zoo.training.optimiser import learning_rate, make_optimiser, set_learning_rate
from zoo.training.run_folder import CURVE, RESULT, RunFolder
from zoo.training.seeds import derived_generator, derived_seed
from zoo.training.train_config import TrainConfig


class TrainingError(MixerError, RuntimeError):
    """Training cannot go on: the loss or the gradient is not finite."""


@dataclass(frozen=True)
class StepReport:
    """What `on_step` gets after each optimiser step.

    step: 1..steps. loss: training loss, nats per (masked) byte. bits: of the last held-out evaluation, or None.
    tokens_per_second: of this step. measure: what `bits` are, "bits_per_byte" or "bits_per_masked_byte".
    """

    step: int
    steps: int
    loss: float
    bits: float | None
    tokens_per_second: float
    measure: str = NEXT

    @property
    def bits_per_byte(self) -> float | None:
        """`bits` of a model of next bytes; None for another one, and before the first evaluation."""
        return self.bits if self.measure == NEXT else None


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    bits: on `evaluated_bytes` (masked) bytes of held-out text. measure: what they are, "bits_per_byte" or
    "bits_per_masked_byte"; the two are never to be compared. losses: of each training step, nats per (masked) byte.
    tokens_per_second: bytes trained on over the time of the steps. seconds: time of the steps, earlier parts of an
    interrupted run included. parameters: number of elements. resumed_from: step, 0 for a run from the beginning.
    """

    bits: float
    measure: str
    evaluated_bytes: int
    losses: list[float]
    tokens_per_second: float
    seconds: float
    parameters: int
    steps: int
    resumed_from: int
    corpus: str
    model: LanguageModel = field(repr=False, compare=False)

    @property
    def bits_per_byte(self) -> float | None:
        """`bits` of a model of next bytes; None for one of masked bytes."""
        return self.bits if self.measure == NEXT else None

    def summary(self) -> dict[str, Any]:
        """Everything but the model and the losses, as plain data."""
        return {
            self.measure: self.bits,
            "evaluated_bytes": self.evaluated_bytes,
            "final_loss": self.losses[-1],
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "parameters": self.parameters,
            "steps": self.steps,
            "resumed_from": self.resumed_from,
            "corpus": self.corpus,
            "torch": torch.__version__,
        }


def train_language_model(
    config: TrainConfig,
    on_step: Callable[[StepReport], None] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool | None = None,
    corpus: Corpus | None = None,
    on_note: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train a language model and evaluate it on held-out text.

    config: decides the numbers. on_step: called after each step. on_note: called with a line of text now and then.
    out: folder for checkpoints, metrics and result; None writes nothing. resume: see RunFolder.open.
    corpus: one already loaded; otherwise `config.corpus` is read.
    The global random state is left as it was.
    Raises ConfigError, CorpusError, CheckpointError before any work, TrainingError if the loss is not finite.
    """
    config = config.on_device()
    note = on_note or (lambda line: None)
    text = load_corpus(config.corpus, held_out=config.held_out, files=config.corpus_files) if corpus is None else corpus
    text.require(config.context)
    plain = config.model_dump(mode="json")
    folder = None if out is None else RunFolder(out)
    device = torch.device(config.device)
    with _writing(folder), _own_random_state(device):
        checkpoint = None if folder is None else folder.open(plain, text.fingerprint, resume=resume)
        trainer = _Trainer(config, text, device)
        if checkpoint is not None:
            restore(checkpoint, trainer.model, trainer.optimiser)
            note(f"going on from step {checkpoint.step} of {folder.path if folder else ''}")
        trainer.try_forward()
        start = 0 if checkpoint is None else checkpoint.step
        records: list[dict[str, Any]] = []
        if folder is not None:
            records = folder.start(plain, text.fingerprint, start, fresh=resume is False)
        note(
            f"corpus {text.source}: {text.train.numel():,} bytes to train on, {text.held_out.numel():,} held out; "
            f"model of {trainer.parameters:,} parameters on {config.device}"
            f"{', which predicts masked bytes from both sides' if config.model.masked else ''}"
        )
        for step in range(start + 1, config.steps + 1):
            record = trainer.step(step)
            records.append(record)
            if folder is not None:
                folder.append(record)
                if step % config.checkpoint_every == 0 or step == config.steps:
                    folder.save(Checkpoint(step, plain, text.fingerprint, *snapshot(trainer.model, trainer.optimiser)))
            if on_step is not None:
                on_step(_report(records, config, trainer.measure))
        result = _result(trainer, records, start)
        if folder is not None:
            folder.write_json(RESULT, {**result.summary(), "config": plain})
            from zoo.training.curve import draw_curve

            title = f"{', '.join(_names(config))}: {result.bits:.3f} {in_words(result.measure)}"
            write_file(folder.path / CURVE, draw_curve(records, title, result.measure))
    return result


class _Trainer:
    """Model and optimiser of one run; every random draw is a function of (seed, step)."""

    def __init__(self, config: TrainConfig, corpus: Corpus, device: torch.device) -> None:
        self.config, self.corpus, self.device = config, corpus, device
        torch.manual_seed(derived_seed(config.seed, 0, "initial values"))
        dtype = torch.float64 if config.dtype == "float64" else torch.float32
        self.model = LanguageModel(config.model).to(device=device, dtype=dtype)
        self.optimiser = make_optimiser(self.model, config)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.measure = NEXT if self.model.mask_token is None else MASKED
        windows = corpus.held_out_windows(config.eval_windows, config.context)
        self.held_out = self.examples(windows, derived_generator(0, 0, "held-out mask"))  # whatever the seed

    def try_forward(self) -> None:
        """One window through the model, so that what cannot run says so before anything is written."""
        self.model.eval()
        with torch.no_grad():
            self.loss(*(part[:1] for part in self.held_out))

    def examples(self, windows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [B,T] each, of windows [B, T + 1]; the generator draws the masked places, if any."""
        if self.model.mask_token is None:
            return next_bytes(windows)
        return masked_bytes(windows, self.model.mask_token, generator)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats over the targets there are. inputs, targets: int64 [B,T], NO_TARGET for none."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            logits = self.model(inputs.to(self.device))
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide.flatten(0, 1), targets.to(self.device).flatten(), ignore_index=NO_TARGET)

    def step(self, step: int) -> dict[str, Any]:
        """Optimiser step `step`; returns its line of the metrics. Raises TrainingError if it is not finite."""
        began = time.perf_counter()
        config, model = self.config, self.model
        windows = self.corpus.train_batch(
            config.batch_size, config.context, derived_generator(config.seed, step, "batch")
        )
        torch.manual_seed(derived_seed(config.seed, step, "dropout"))
        model.train()
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.loss(*self.examples(windows, derived_generator(config.seed, step, "mask")))
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        values = {"loss": loss.item(), "grad_norm": norm.item()}
        for what, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {what.replace('_', ' ')} is {value} at step {step}; lower learning_rate "
                    f"({config.learning_rate}) or raise warmup_steps ({config.warmup_steps}). "
                    "The last checkpoint stays as it is"
                )
        rate = learning_rate(config, step)
        set_learning_rate(self.optimiser, rate)
        self.optimiser.step()
        model.after_step(step, derived_generator(config.seed, step, "after_step"))
        seconds = time.perf_counter() - began
        record: dict[str, Any] = {"step": step, **values, "learning_rate": rate, "seconds": seconds}
        if step == config.steps or (config.eval_every and step % config.eval_every == 0):
            record[f"held_out_{self.measure}"] = self.evaluate()
        return record

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per (masked) byte on the held-out windows, of which each has as many targets."""
        self.model.eval()
        total = 0.0
        for inputs, targets in zip(*(part.split(self.config.batch_size) for part in self.held_out), strict=True):
            total += self.loss(inputs, targets).item() * inputs.shape[0]
        return total / self.held_out[0].shape[0] / math.log(2)


def _result(trainer: _Trainer, records: list[dict[str, Any]], start: int) -> TrainResult:
    config = trainer.config
    seconds = sum(record["seconds"] for record in records)
    trainer.model.eval()
    return TrainResult(
        bits=records[-1][f"held_out_{trainer.measure}"],
        measure=trainer.measure,
        evaluated_bytes=int((trainer.held_out[1] != NO_TARGET).sum()),
        losses=[record["loss"] for record in records],
        tokens_per_second=len(records) * config.batch_size * config.context / seconds,
        seconds=seconds,
        parameters=trainer.parameters,
        steps=config.steps,
        resumed_from=start,
        corpus=trainer.corpus.fingerprint,
        model=trainer.model,
    )


def _report(records: list[dict[str, Any]], config: TrainConfig, measure: str) -> StepReport:
    last = records[-1]
    evaluated = [r[f"held_out_{measure}"] for r in records if f"held_out_{measure}" in r]
    speed = config.batch_size * config.context / last["seconds"]
    return StepReport(last["step"], config.steps, last["loss"], evaluated[-1] if evaluated else None, speed, measure)


def _names(config: TrainConfig) -> list[str]:
    """Names of the mixers in the order of their first layer."""
    return list(dict.fromkeys(layer.name for layer in config.model.layers))


@contextlib.contextmanager
def _writing(folder: RunFolder | None) -> Iterator[None]:
    """Close the folder at the end; a disk that refuses is a CheckpointError."""
    try:
        yield
    except OSError as error:
        if folder is None or isinstance(error, MixerError):
            raise
        raise CheckpointError(f"cannot write {error.filename or folder.path}: {error.strerror or error}") from error
    finally:
        if folder is not None:
            folder.close()


@contextlib.contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Give the global random state back as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield

"""`zoo train` and `zoo generate`."""

from __future__ import annotations

import codecs
import math
import sys
import unicodedata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="YAML or JSON file; examples are in configs/.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/<name of the config>.")]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps, over the config's.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default cuda where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 (autocast) or float64.")]
Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--fresh",
        help="Insist on going on from a checkpoint, or set an older run in the folder aside and begin anew. "
        "By default a run that was interrupted goes on.",
    ),
]
CorpusPath = Annotated[Path | None, typer.Option("--corpus", help="Folder or file of text, over the config's.")]


def train(
    config: Config,
    out: Out = None,
    steps: Steps = None,
    device: Device = None,
    dtype: Dtype = None,
    resume: Resume = None,
    corpus: CorpusPath = None,
) -> None:
    """Train a language model on bytes of real text; the same command goes on after an interruption."""
    from zoo.training import StepReport, TrainConfig, train_language_model
    from zoo.training.objective import in_words

    settings = TrainConfig.from_file(
        config, steps=steps, device=device, dtype=dtype, corpus=None if corpus is None else str(corpus)
    )
    folder = out if out is not None else Path("runs") / config.stem
    console = Console(highlight=False, soft_wrap=True)
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = progress.add_task("training", total=settings.steps, told="")
    every = max(1, settings.steps // 10)

    def show(report: StepReport) -> None:
        told = f"{report.loss / math.log(2):.3f} {in_words(report.measure)}, {report.tokens_per_second:,.0f} tokens/s"
        if report.bits is not None:
            told = f"{told}, held out {report.bits:.3f}"
        progress.update(task, completed=report.step, told=told)
        if not console.is_terminal and (report.step % every == 0 or report.step == report.steps):
            console.print(f"step {report.step}/{report.steps}: {told}")

    try:
        with progress:
            result = train_language_model(
                settings,
                show,
                out=folder,
                resume=resume,
                on_note=lambda line: console.print(line, markup=False),
            )
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on from the last checkpoint in {folder}", markup=False)
        raise typer.Exit(130) from None
    console.print(
        f"{result.bits:.4f} {in_words(result.measure)} on {result.evaluated_bytes:,} held-out bytes after "
        f"{result.steps} steps ({result.tokens_per_second:,.0f} tokens/s); see {folder}",
        markup=False,
    )


RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The --out of a `zoo train`.")]
Prompt = Annotated[str, typer.Option(help="Text to go on from.")]
Tokens = Annotated[int, typer.Option(help="Bytes to generate.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest byte; 1 samples what the model says.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]
On = Annotated[str, typer.Option("--device", help="cpu, cuda, ...")]


def generate(
    run_dir: RunDir,
    prompt: Prompt = "def ",
    tokens: Tokens = 300,
    temperature: Temperature = 0.8,
    seed: Seed = 0,
    device: On = "cpu",
) -> None:
    """Write text with the model of a training run, one byte at a time through `extend`."""
    from zoo.models.generation import generate_bytes
    from zoo.training.run_model import load_run

    model, _, _ = load_run(run_dir, device=device)
    start = prompt.encode("utf-8", "surrogateescape")
    pieces = generate_bytes(model, start, tokens, temperature=temperature, seed=seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    sys.stdout.write(prompt)
    for byte in pieces:
        sys.stdout.write(_printable(decoder.decode(bytes([byte]))))
        sys.stdout.flush()
    sys.stdout.write(_printable(decoder.decode(b"", final=True)) + "\n")


def _printable(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)

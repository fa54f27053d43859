"""`zoo bench`: every registered mixer head to head on this machine."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sequence_mixer.errors import ConfigError
from zoo.cli.inspect import device_named, dtype_named
from zoo.registry import registry

if TYPE_CHECKING:
    from zoo.bench.run import Progress as Told

BASELINE = "attention"
MINUTES = {"cpu": 4.0, "cuda": 12.0}


def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Mixers to compare; all registered ones by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda if there is one, else cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16 on CUDA, float32 on a CPU by default.")] = "auto",
    length: Annotated[list[int] | None, typer.Option(min=1, help="Sequence lengths; repeatable.")] = None,
    d_model: Annotated[int | None, typer.Option(min=1, help="Width of the mixers, D.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Time for measuring; what does not fit is skipped and marked, and a second run fills it in. "
            f"{MINUTES['cpu']:g} on a CPU and {MINUTES['cuda']:g} on CUDA by default, 0 for no limit.",
        ),
    ] = None,
    baseline: Annotated[str, typer.Option(help="Mixer the crossovers are counted against.")] = BASELINE,
    out: Annotated[Path, typer.Option(help="Folder for results.json and results.png.")] = Path("bench-out"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure anew instead of going on with an earlier run.")
    ] = False,
    train: Annotated[bool, typer.Option(help="Include the short training run on real text.")] = True,
    check: Annotated[
        bool, typer.Option(help="Run the conformance suite first and mark mixers that are not green.")
    ] = True,
) -> None:
    """Compare mixers: forward, train step and decode time against length, memory, cost model, bits per byte."""
    where = device_named(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    kind = dtype_named(("bfloat16" if where.type == "cuda" else "float32") if dtype == "auto" else dtype)
    chosen = list(dict.fromkeys(names)) if names else registry.names()
    if not chosen:
        raise ConfigError("no mixer is registered; `zoo plugins` shows why")
    for name in [*(names or []), *([baseline] if baseline != BASELINE else [])]:
        registry.definition(name)  # those that were not asked for by name are marked if they do not load

    from zoo.bench import cases, machine, picture, run, store, tables
    from zoo.durable import write_file

    sizes = cases.sizes_for(where).changed(tuple(length) if length else None, d_model)
    if d_model is not None:
        for name in names or []:
            cases.config_of(name, sizes.d_model, sizes.lengths[0])
    about = {**machine.describe_machine(where), "dtype": str(kind), "sizes": asdict(sizes)}
    console = Console(highlight=False)
    results, word = store.Results.open(out, about, fresh=fresh)
    try:
        if word:
            console.print(word, markup=False, soft_wrap=True)
        given = MINUTES.get(where.type, math.inf) if minutes is None else minutes or math.inf
        with Progress(*_columns(), console=console, disable=not console.is_terminal) as bar:
            rows = run.run(
                chosen, sizes, where, kind, results, seconds=60 * given, train=train, check=check,
                progress=_shown(bar, console),
            )  # fmt: skip
        title = f"{about['device']}, {about['dtype']}, D = {sizes.d_model}, {sizes.tokens} tokens per call"
        write_file(results.picture, picture.draw(rows, baseline, title))
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on with what is in {results.path}", markup=False)
        raise typer.Exit(130) from None
    finally:
        results.close()
    for table in (tables.details(rows, baseline, sizes.tokens), tables.summary(rows, baseline)):
        console.print(table, "")
    for line in tables.notes(rows, baseline):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"wrote {results.path} and {results.picture}", markup=False, soft_wrap=True)


def _columns() -> tuple[TextColumn | BarColumn | MofNCompleteColumn | TimeElapsedColumn, ...]:
    return (
        TextColumn("bench"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )  # fmt: skip


def _shown(bar: Progress, console: Console) -> Told:
    """Progress on the bar, or as a line every twentieth of the way where there is no terminal."""
    task = bar.add_task("")
    told = [-1]

    def show(done: int, total: int, what: str) -> None:
        bar.update(task, completed=done, total=total, description=what)
        if not console.is_terminal and (20 * done // max(1, total) > told[0] or done == total):
            told[0] = 20 * done // max(1, total)
            console.print(f"{done}/{total} {what}", markup=False)

    return show

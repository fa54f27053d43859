"""`zoo bench`: every registered mixer head to head on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sequence_mixer.errors import ConfigError
from zoo.cli.inspect import device_named, dtype_named
from zoo.registry import registry

console = Console(highlight=False)


def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Mixers to compare; all registered ones by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda if there is one, else cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16 on CUDA, float32 on a CPU by default.")] = "auto",
    length: Annotated[list[int] | None, typer.Option(min=1, help="Sequence lengths; repeatable.")] = None,
    d_model: Annotated[int | None, typer.Option(min=1)] = None,
    baseline: Annotated[str, typer.Option(help="Mixer the crossovers are counted against.")] = "attention",
    out: Annotated[Path, typer.Option(help="Folder for results.json and results.png.")] = Path("bench-out"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure anew instead of going on with an earlier run.")
    ] = False,
    train: Annotated[bool, typer.Option(help="Include the short training run on real text.")] = True,
    check: Annotated[
        bool, typer.Option(help="Run the conformance suite first and mark rows that are not green.")
    ] = True,
) -> None:
    """Compare mixers: forward, train step and decode time against length, memory, cost model, bits per byte."""
    where = device_named(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    kind = dtype_named(("bfloat16" if where.type == "cuda" else "float32") if dtype == "auto" else dtype)
    chosen = names or registry.names()
    if not chosen:
        raise ConfigError("no mixer is registered")
    for name in chosen:
        registry.definition(name)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file, wanted a folder")

    from zoo.bench import report
    from zoo.bench.cases import sizes_for
    from zoo.bench.run import run

    sizes = sizes_for(where).smaller(tuple(length) if length else None, d_model)
    columns = (TextColumn("bench"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("")
        results = run(
            chosen, sizes, where, kind, out / "results.json", fresh=fresh, train=train, check=check,
            progress=lambda done, total, what: progress.update(task, completed=done, total=total, description=what),
            tell=lambda word: progress.console.print(word, markup=False),
        )  # fmt: skip
    rows = {key: row for key, row in results.rows.items() if row["mixer"] in chosen}
    console.print(report.table(rows, baseline))
    if baseline in chosen:
        console.print(report.crossover_table(rows, baseline))
    title = f"{results.about['device']}, {results.about['dtype']}, D = {sizes.d_model}, {sizes.tokens} tokens per call"
    report.draw(rows, baseline, title, out / "results.png")
    console.print(f"wrote {out / 'results.json'} and {out / 'results.png'}", markup=False)

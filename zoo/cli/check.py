"""`zoo check`: the conformance suite on a registered mixer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sequence_mixer.conformance import check_mixer
from sequence_mixer.errors import ConfigError
from zoo.cli.inspect import device_named, dtype_named
from zoo.registry import registry

console = Console(highlight=False)


def check(
    names: Annotated[list[str] | None, typer.Argument(help="Mixers to check; all registered ones by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help="Dtypes of the backend comparison; repeatable.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every result to this file.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show passed and skipped checks too.")] = False,
) -> None:
    """Run the conformance suite over every example config. Exits 1 if a check fails."""
    chosen = names or registry.names()
    if not chosen:
        raise ConfigError("no mixer is registered")
    where = device_named(device)
    dtypes = tuple(dtype or ["float32"])
    for kind in dtypes:
        dtype_named(kind)
    for name in chosen:
        registry.definition(name)
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"the folder {json_file.parent} for --json does not exist")
    reports: dict[str, Any] = {}
    green = True
    for name in chosen:
        columns = (
            TextColumn(f"{name:>18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=None)

            def show_step(done: int, total: int, what: str, progress: Progress = progress, task: Any = task) -> None:
                progress.update(task, completed=done, total=total, description=what)

            report = check_mixer(name, device=str(where), dtypes=dtypes, progress=show_step)
        green = green and report.ok
        reports[name] = report.to_json()
        _print_report(name, report, verbose)
        if json_file is not None:
            json_file.write_text(json.dumps(reports, indent=1))
    if not green:
        raise typer.Exit(1)


def _print_report(name: str, report: Any, verbose: bool) -> None:
    counts: dict[str, int] = {}
    for result in report.results:
        counts[result.status] = counts.get(result.status, 0) + 1
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    colour = "green" if report.ok else "red"
    console.print(f"[{colour}]{name}[/{colour}]: {told}")
    shown = [result for result in report.results if verbose or result.status == "failed"]
    if shown:
        table = Table("check", "example", "dtype", "status", "message")
        for result in shown:
            table.add_row(result.check, result.example, result.dtype, result.status, escape(result.message))
        console.print(table)

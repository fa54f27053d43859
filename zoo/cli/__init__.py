"""The `zoo` command. Errors of ours end in one message and exit status 2, without a traceback."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from sequence_mixer.errors import MixerError
from zoo.cli.bench import bench
from zoo.cli.check import check
from zoo.cli.inspect import explain, matrix
from zoo.cli.new import new
from zoo.cli.registered import list_mixers, plugins, show
from zoo.cli.train import generate, train

app = typer.Typer(
    name="zoo",
    help="Sequence mixers by name: list, check, compare, train.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("list")(list_mixers)
for command in (show, check, bench, train, generate, explain, matrix, plugins, new):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mixer-zoo {version('mixer-zoo')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Sequence mixers by name: list, check, compare, train."""


def main() -> None:
    """Entry point of the `zoo` script."""
    try:
        app()
    except MixerError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {escape(str(error))}")
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"[red]error:[/red] {escape(f'{error.filename}: {error.strerror}')}"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)

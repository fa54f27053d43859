"""`zoo list`, `zoo show`, `zoo plugins`: what is registered."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zoo.mixer_table import mixer_rows
from zoo.registry import registry

console = Console(highlight=False)


def list_mixers(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the registered mixers with what each can do."""
    rows, failures = mixer_rows()
    if as_json:
        print(json.dumps({"mixers": rows, "failures": failures}, indent=2))
        return
    table = _table("mixer", "direction", "can", "mixing matrix", "backends", whole=(0, 1, 3))
    for row in rows:
        abilities = {"decode": row["stateful"], "pack": row["varlen"], "pad": row["padding_mask"]}
        can = ", ".join(word for word, able in abilities.items() if able) or "-"
        structures = row["structure"].replace(", ", "\n")
        table.add_row(row["name"], row["direction"], can, structures, ", ".join(row["backends"]))
    console.print(table)
    for name, why in failures.items():
        console.print(f"[red]{name}[/red] did not load: {escape(why)}")


def show(
    name: str,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON schema of the config.")] = False,
) -> None:
    """Show a mixer: options with defaults and meaning, capabilities, examples, source."""
    definition = registry.definition(name)
    schema = definition.config.model_json_schema()
    if as_json:
        print(json.dumps(schema, indent=2))
        return
    console.print(f"[bold]{definition.name}[/bold]  {definition.source}  ({definition.status})")
    options = _table("option", "type", "default", "meaning", whole=(0,))
    for key, field in definition.config.model_fields.items():
        default = "required" if field.is_required() else repr(field.default)
        kind = getattr(field.annotation, "__name__", None) or str(field.annotation)
        options.add_row(key, escape(kind.replace("typing.", "")), escape(default), escape(field.description or ""))
    console.print(options)
    capabilities = definition.capabilities
    flags = ("causal", "bidirectional", "stateful", "varlen", "padding_mask", "max_length", "matrix_form",
             "value_linear", "data_dependent")  # fmt: skip
    console.print("can: " + ", ".join(flag for flag in flags if capabilities.has(flag)))
    console.print("mixing matrix: " + ", ".join(str(structure) for structure in capabilities.structures), markup=False)
    console.print("backends: " + ", ".join(spec.name for spec in capabilities.backends))
    console.print("examples: " + ", ".join(definition.examples))
    for check_id, why in definition.known_failures.items():
        console.print(f"known failure: {check_id}: {why}", markup=False)


def plugins(
    trace: Annotated[bool, typer.Option("--trace", help="Print the traceback of each plugin that failed.")] = False,
) -> None:
    """List the plugins: where each comes from, whether it loads, and why not. Exits 1 if one failed."""
    rows = registry.plugins()
    table = _table("plugin", "distribution", "contract", "mixers", "status", "reason", whole=(0, 3))
    for row in rows:
        colour = {"loaded": "green", "failed": "red", "off": "yellow"}[row.status]
        contract = row.contract.removeprefix("sequence_mixer:") or "none"
        status = f"[{colour}]{row.status}[/{colour}]"
        about = f"{row.distribution} {row.version}"
        table.add_row(row.package, about, contract, ", ".join(row.names), status, escape(row.reason))
    console.print(table)
    if trace:
        for row in rows:
            if row.trace:
                console.print(f"\n{row.package}:\n{row.trace}", markup=False)
    if any(row.status == "failed" for row in rows):
        raise typer.Exit(1)


def _table(*headings: str, whole: tuple[int, ...]) -> Table:
    """A table for a terminal of 80 columns; the columns in `whole` are never broken, the others where they must."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, no_wrap=index in whole, overflow="fold")
    return table

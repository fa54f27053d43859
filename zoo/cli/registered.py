"""`zoo list`, `zoo show`, `zoo plugins`: what is registered."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
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
    table = Table("mixer", "direction", "decodes", "packs", "pads", "structure", "backends", "source")
    for row in rows:
        yes = {True: "yes", False: "-"}
        table.add_row(
            row["name"], row["direction"], yes[row["stateful"]], yes[row["varlen"]], yes[row["padding_mask"]],
            row["structure"], ", ".join(row["backends"]), row["source"],
        )  # fmt: skip
    console.print(table)
    for name, why in failures.items():
        console.print(f"[red]{name}[/red] did not load: {why}", markup=True)


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
    options = Table("option", "type", "default", "meaning")
    for key, field in definition.config.model_fields.items():
        default = "required" if field.is_required() else repr(field.default)
        kind = getattr(field.annotation, "__name__", None) or str(field.annotation)
        options.add_row(key, kind.replace("typing.", ""), default, field.description or "")
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
    table = Table("plugin", "distribution", "contract", "mixers", "status", "reason")
    for row in rows:
        colour = {"loaded": "green", "failed": "red", "off": "yellow"}[row.status]
        table.add_row(
            row.package, f"{row.distribution} {row.version}", row.contract or "none", ", ".join(row.names),
            f"[{colour}]{row.status}[/{colour}]", row.reason.replace("[", r"\["),
        )  # fmt: skip
    console.print(table)
    if trace:
        for row in rows:
            if row.trace:
                console.print(f"\n{row.package}:\n{row.trace}", markup=False)
    if any(row.status == "failed" for row in rows):
        raise typer.Exit(1)

"""The table of registered mixers, for `zoo list` and for the README, from the registry alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sequence_mixer.definition import Structure
from sequence_mixer.errors import MixerError
from zoo.registry import registry


def mixer_rows() -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row per mixer that loads (default config), and name -> reason for those that do not."""
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for name in registry.names():
        try:
            definition = registry.definition(name)
        except MixerError as error:
            failures[name] = str(error)
            continue
        able = definition.capabilities
        rows.append(
            {
                "name": name,
                "direction": directions(
                    [definition.capabilities_of(definition.example(k)) for k in definition.examples]
                ),
                "stateful": able.stateful,
                "varlen": able.varlen,
                "padding_mask": able.padding_mask,
                "structure": ", ".join(structure_name(structure) for structure in able.structures),
                "backends": [spec.name for spec in able.backends],
                "source": definition.source,
            }
        )
    return rows, failures


def directions(able: list[Any]) -> str:
    """ "causal", "bidirectional" or "both", over the examples of a mixer."""
    causal, both_sides = any(c.causal for c in able), any(c.bidirectional for c in able)
    return "both" if causal and both_sides else "causal" if causal else "bidirectional"


def structure_name(structure: Structure) -> str:
    """A structure as one word: `Semiseparable`, `Masked(OneSemiseparable)`."""
    mask = getattr(structure, "mask", None)
    return f"{type(structure).__name__}({type(mask).__name__})" if mask is not None else type(structure).__name__


def markdown_table() -> str:
    """The README's table of mixers."""
    lines = [
        "| mixer | direction | decodes | packs | mixing matrix | backends | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in mixer_rows()[0]:
        decodes, packs = ("yes" if row[key] else "no" for key in ("stateful", "varlen"))
        lines.append(
            f"| `{row['name']}` | {row['direction']} | {decodes} | {packs} | {row['structure']} "
            f"| {', '.join(row['backends'])} | {row['source']} |"
        )
    return "\n".join(lines)


BEGIN, END = "<!-- mixers: begin", "<!-- mixers: end -->"


def with_table(text: str) -> str:
    """`text` with the table between its two markers replaced by the current one."""
    head, _, rest = text.partition(BEGIN)
    comment, _, rest = rest.partition("\n")
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}{comment}\n{markdown_table()}\n{END}{tail}"


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--write":
        path = Path(sys.argv[2])
        path.write_text(with_table(path.read_text()))
    else:
        print(markdown_table())

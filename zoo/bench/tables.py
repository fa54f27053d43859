"""Results as text: a summary per mixer, a table per mixer and length, and notes on what was not measured."""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.table import Table

from zoo.bench.cases import KINDS
from zoo.bench.crossover import Curve, curves, told_crossover
from zoo.bench.store import DONE, FAILED, SKIPPED, Row, Rows

BOTH_SIDES = "both sides"
RED_SHOWN = 3  # failed checks that are told of one mixer


def summary(rows: Rows, baseline: str) -> Table:
    """One row per mixer: conformance, bits per byte, and from which length on it beats the baseline."""
    table = Table(title=f"Mixers, and the length from which on each is faster than {baseline}", **_STYLE)
    for heading in ("mixer", "tokens see ", "conformance"):
        table.add_column(heading, overflow="fold")
    for heading in ("bits/byte\nsmoke run", *KINDS):
        table.add_column(heading, justify="right")
    by_kind = {kind: curves(rows, kind) for kind in KINDS}
    for name in mixers(rows, baseline):
        told = [
            "" if name == baseline else told_crossover(found.get(name, {}), found.get(baseline, {}))
            for found in by_kind.values()
        ]
        table.add_row(name, _sight(rows, name), _verdict(rows, name), _quality(rows, name), *told)
    return table


def details(rows: Rows, baseline: str, tokens: int) -> Table:
    """One row per mixer and length: times, memory, and the cost model's FLOPs and bytes beside the forward time."""
    title = f"Medians; {tokens} tokens in a forward or train step call, decode is one token after T"
    table = Table(title=title, **_STYLE)
    table.add_column("mixer\n     T", overflow="fold", min_width=8)
    for heading in ("forward\nms", "train\nms", "decode\nms", "peak\nMiB", "state\nKiB", "model\nGFLOP", "GFLOP\nper s",
                    "model\nMiB", "GB\nper s"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    by_kind = {kind: curves(rows, kind) for kind in KINDS}
    for name in mixers(rows, baseline):
        lengths = sorted({row["length"] for row in rows.values() if row["mixer"] == name and "length" in row})
        verdict = _verdict(rows, name)
        table.add_row(name, *([verdict] if verdict in ("RED", "failed") else []), end_section=not lengths)
        for length in lengths:
            cells = _cells(rows, by_kind, name, length)
            table.add_row(f"{length:>6}", *cells, end_section=length == lengths[-1])
    return table


def notes(rows: Rows, baseline: str) -> list[str]:
    """One line for everything that is red, failed, or was left out, and what the table does not say by itself."""
    lines = []
    names = mixers(rows, baseline)
    for name in names:
        of = [row for row in rows.values() if row["mixer"] == name]
        red = {check: message for row in of for check, message in row.get("failures", {}).items()}
        lines += [f"{name}: red: {check}: {_first_line(message)}" for check, message in list(red.items())[:RED_SHOWN]]
        if len(red) > RED_SHOWN:
            lines.append(f"{name}: red: {len(red) - RED_SHOWN} checks more; zoo check {name} lists them")
        failed = [row for row in of if row["outcome"] == FAILED]
        for error in dict.fromkeys(row["error"] for row in failed):
            lines.append(f"{name}: failed: {_places([row for row in failed if row['error'] == error])}: {error}")
        skipped = [row for row in of if row["outcome"] == SKIPPED]
        if skipped:
            lines.append(f"{name}: no time for {_places(skipped)}; run it again, or with more --minutes")
        for row in of:
            if row["outcome"] == DONE and "reason" in row:
                lines.append(f"{name}: no {row['kind']}: {_first_line(row['reason'])}")
            if row.get("causal_by_option"):
                lines.append(f"{name}: trained with causal=True, measured without")
            if "bits_per_masked_byte" in row:
                lines.append(f"{name}: trained on masked bytes; its number is bits per masked byte, not bits per byte")
    across = [name for name in names if _sight(rows, name) == BOTH_SIDES and name != baseline]
    if across and baseline in names and _sight(rows, baseline) != BOTH_SIDES:
        lines.append(f"{', '.join(across)}: every token sees both sides, while {baseline} is causal here")
    return lines


def mixers(rows: Rows, baseline: str) -> list[str]:
    """Names of the mixers, the baseline first."""
    return sorted({row["mixer"] for row in rows.values()}, key=lambda name: (name != baseline, name))


_STYLE: dict[str, Any] = {
    "title_justify": "left",
    "title_style": "bold",
    "box": box.SIMPLE_HEAD,
    "padding": 0,
    "pad_edge": False,
    "show_edge": False,
}


def _cells(rows: Rows, by_kind: dict[str, dict[str, Curve]], name: str, length: int) -> list[str]:
    of = {kind: rows.get(f"{name} | {kind} | {length}") for kind in KINDS}
    times = [by_kind[kind].get(name, {}).get(length) for kind in KINDS]
    forward = of["forward"] or {}
    flops, moved, ms = forward.get("flops"), forward.get("bytes"), times[0]
    return [
        *(_time(row, value) for row, value in zip(of.values(), times, strict=True)),
        scaled((of["train step"] or {}).get("peak_bytes"), 2**20),
        scaled((of["decode"] or {}).get("state_bytes"), 2**10),
        scaled(flops, 1e9),
        scaled(flops, ms * 1e6) if ms else "-",
        scaled(moved, 2**20),
        scaled(moved, ms * 1e6) if ms else "-",
    ]


def scaled(value: float | None, unit: float) -> str:
    """A quantity in a unit, with three significant digits, no exponent, three decimals at most; "-" for None."""
    if value is None:
        return "-"
    number = value / unit
    if number == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:.{min(digits, 3)}f}"


def _time(row: Row | None, milliseconds: float | None) -> str:
    if row is None:
        return "-"
    if milliseconds is None:
        return {SKIPPED: "no time", FAILED: "failed"}.get(row["outcome"], "-")
    return scaled(milliseconds, 1.0)


def _verdict(rows: Rows, name: str) -> str:
    """Conformance in a word; "failed" if the mixer could not even be built."""
    row = rows.get(f"{name} | conformance") or rows.get(f"{name} | build") or {}
    if row.get("outcome") == FAILED:
        return "failed"
    verdict = str(row.get("verdict", "not run"))
    return {"red": "RED", "green so far": f"green {row.get('ran')}/{row.get('of')}"}.get(verdict, verdict)


def _quality(rows: Rows, name: str) -> str:
    """Bits per byte of the smoke run, bits per masked byte marked as such, or why there is no number."""
    row = rows.get(f"{name} | smoke run", {})
    if "bits_per_byte" in row:
        return f"{row['bits_per_byte']:.3f}{'*' if row.get('causal_by_option') else ''}"
    if "bits_per_masked_byte" in row:
        return f"{row['bits_per_masked_byte']:.3f}\nmasked"  # another measure, and so marked
    return {SKIPPED: "no time", FAILED: "failed"}.get(row.get("outcome", ""), "-")


def _sight(rows: Rows, name: str) -> str:
    """What a token sees in the config that was measured."""
    known = [row["causal"] for row in rows.values() if row["mixer"] == name and "causal" in row]
    if not known:
        return "-"
    return "the past" if known[0] else BOTH_SIDES


def _places(rows: list[Row]) -> str:
    """`forward at T = 1024, 2048; smoke run`."""
    lengths: dict[str, list[str]] = {}
    for row in rows:
        lengths.setdefault(row["kind"], []).extend([str(row["length"])] if "length" in row else [])
    return "; ".join(f"{kind} at T = {', '.join(found)}" if found else kind for kind, found in lengths.items())


def _first_line(text: str) -> str:
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= 200 else line[:197] + "..."

"""Results as a table and a picture, and the length at which a mixer overtakes the baseline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from zoo.bench.cases import KINDS
from zoo.bench.timing import median

Curve = dict[int, float]  # T -> milliseconds


def curves(rows: dict[str, dict[str, Any]], kind: str) -> dict[str, Curve]:
    """mixer -> {T: median milliseconds} of one kind of call."""
    found: dict[str, Curve] = {}
    for row in rows.values():
        if row.get("kind") == kind and "samples_ms" in row:
            found.setdefault(row["mixer"], {})[row["length"]] = median(row["samples_ms"])
    return {name: dict(sorted(curve.items())) for name, curve in sorted(found.items())}


def crossover(curve: Curve, baseline: Curve) -> float | None:
    """The length from which on `curve` stays below `baseline`, interpolated on log-log axes.

    None if it is not below at the largest common length; the smallest common length if it is below everywhere.
    """
    lengths = sorted(set(curve) & set(baseline))
    if not lengths or curve[lengths[-1]] >= baseline[lengths[-1]]:
        return None
    ratio = {length: math.log(curve[length] / baseline[length]) for length in lengths}
    above = [length for length in lengths if ratio[length] >= 0]
    if not above:
        return float(lengths[0])
    low = above[-1]
    high = lengths[lengths.index(low) + 1]
    share = ratio[low] / (ratio[low] - ratio[high])
    return float(math.exp(math.log(low) + share * (math.log(high) - math.log(low))))


def told_crossover(curve: Curve, baseline: Curve) -> str:
    """The crossover in words: a length, `<= T` if it is below everywhere, `> T` if it never is."""
    lengths = sorted(set(curve) & set(baseline))
    if not lengths:
        return "-"
    at = crossover(curve, baseline)
    if at is None:
        return f"> {lengths[-1]}"
    return f"<= {lengths[0]}" if at <= lengths[0] else f"{at:.0f}"


def table(rows: dict[str, dict[str, Any]], baseline: str) -> Table:
    """One row per mixer and length, with the cost model's FLOPs and bytes beside the measured time."""
    shown = Table(title="medians; B x T tokens per call, decode is one token after T", title_justify="left")
    for heading in ("mixer", "T", "forward ms", "train step ms", "decode ms", "peak MiB", "state KiB", "model GFLOP",
                    "GFLOP/s", "model MiB", "GB/s", "bits/byte (smoke run)", "conformance"):  # fmt: skip
        shown.add_column(heading, justify="left" if heading in ("mixer", "conformance") else "right")
    by_kind = {kind: curves(rows, kind) for kind in KINDS}
    for name in sorted({row["mixer"] for row in rows.values()}, key=lambda mixer: (mixer != baseline, mixer)):
        lengths = sorted({row["length"] for row in rows.values() if row["mixer"] == name and "length" in row})
        for index, length in enumerate(lengths):
            shown.add_row(*_cells(rows, by_kind, name, length, index == 0), end_section=length == lengths[-1])
    return shown


def crossover_table(rows: dict[str, dict[str, Any]], baseline: str) -> Table:
    """Length from which on each mixer is faster than the baseline, by kind of call."""
    shown = Table("mixer", *KINDS, title=f"length from which on a mixer beats {baseline}", title_justify="left")
    by_kind = {kind: curves(rows, kind) for kind in KINDS}
    for name in sorted({row["mixer"] for row in rows.values()} - {baseline}):
        told = [told_crossover(by_kind[kind].get(name, {}), by_kind[kind].get(baseline, {})) for kind in KINDS]
        shown.add_row(name, *told)
    return shown


def draw(rows: dict[str, dict[str, Any]], baseline: str, title: str, path: Path) -> None:
    """Write a PNG: time against T for each kind of call, crossovers with the baseline marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, len(KINDS)), KINDS, strict=True):
        found = curves(rows, kind)
        for index, (name, curve) in enumerate(found.items()):
            colour = f"C{index % 10}"
            axes.plot(list(curve), list(curve.values()), marker="o", markersize=3, label=name, color=colour)
            at = None if name == baseline else crossover(curve, found.get(baseline, {}))
            if at is not None and at > min(curve):
                axes.axvline(at, color=colour, linestyle=":", linewidth=1)
                axes.annotate(f"{at:.0f}", (at, 0.02), xycoords=("data", "axes fraction"), color=colour, rotation=90)
        axes.set(title=kind, xlabel="sequence length T", ylabel="milliseconds", xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
        if found:
            axes.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _cells(
    rows: dict[str, dict[str, Any]], by_kind: dict[str, dict[str, Curve]], name: str, length: int, first: bool
) -> list[str]:
    of = {kind: rows.get(f"{name} | {kind} | {length}", {}) for kind in KINDS}
    times = [by_kind[kind].get(name, {}).get(length) for kind in KINDS]
    forward, ms = of["forward"], times[0]
    quality = rows.get(f"{name} | smoke run", {})
    green = rows.get(f"{name} | conformance", {}).get("verdict", "not run")
    flops, moved = forward.get("flops"), forward.get("bytes")
    return [
        name if first else "",
        str(length),
        *(f"{value:.3g}" if value is not None else "-" for value in times),
        _scaled(of["train step"].get("peak_bytes"), 2**20),
        _scaled(of["decode"].get("state_bytes"), 2**10),
        _scaled(flops, 1e9),
        _scaled(flops, ms * 1e6) if ms else "-",
        _scaled(moved, 2**20),
        _scaled(moved, ms * 1e6) if ms else "-",
        (f"{quality['bits_per_byte']:.3f}" if "bits_per_byte" in quality else quality.get("reason", "-"))
        if first
        else "",
        green if first else "",
    ]


def _scaled(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.3g}"

"""Pictures of an operators.json: ours against the peers that were timed beside it, and times against length."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from zoo.bench.crossover import Curve, told_crossover
from zoo.bench.timing import median

KINDS = {"fwd": "forward", "f+b": "forward + backward"}
LENGTH = re.compile(r" T(\d+)$")
FORMS, AGAINST = "lti_scan 65536 tokens", "ssd against cuDNN attention"  # how the rows of a curve begin


def time_of(entry: dict[str, Any], kind: str) -> float | None:
    """Median milliseconds in a CUDA graph, or of plain calls where none was captured; None if not measured."""
    samples = entry.get(f"{kind} graph") or entry.get(f"{kind} eager")
    return median(samples) if samples else None


def curves_of(rows: list[dict[str, Any]], beginning: str, kind: str) -> dict[str, Curve]:
    """who -> {T: milliseconds} over the rows whose names begin so and end in a length."""
    found: dict[str, Curve] = {}
    for row in rows:
        length = LENGTH.search(row["row"])
        if not row["row"].startswith(beginning) or not length:
            continue
        for entry in row["timings"]:
            ms = time_of(entry, kind)
            if ms is not None:
                found.setdefault(entry["who"], {})[int(length[1])] = ms
    return {who: dict(sorted(curve.items())) for who, curve in sorted(found.items())}


def draw(rows: list[dict[str, Any]], title: str, folder: Path) -> list[str]:
    """Writes operators.png and lengths.png as far as there are rows for them; returns their names."""
    made = []
    for name, panels in (("operators.png", _bars), ("lengths.png", _lengths)):
        figure = panels(rows)
        if figure is not None:
            figure.suptitle(title, fontsize=10)
            figure.savefig(folder / name, dpi=100)
            made.append(name)
    return made


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain_numbers(axis: Any) -> None:
    """1, 2 and 5 of every decade along a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _bars(rows: list[dict[str, Any]]) -> Any:
    """Milliseconds of the rows that have targets: ours, the fastest peer of the same run, what is asked of one H200."""
    rows = [row for row in rows if any(row["target"]) and row["timings"]]
    if not rows:
        return None
    figure = _figure(15, 1.5 + 0.3 * len(rows))
    for axes, (place, (kind, told)) in zip(figure.subplots(1, 2, sharey=True), enumerate(KINDS.items()), strict=True):
        for at, row in enumerate(rows):
            for who, colour, shift in (("zoo", "C0", -0.18), ("peer", "C7", 0.18)):
                times = [
                    time_of(entry, kind) for entry in row["timings"] if entry["who"].startswith("zoo") == (who == "zoo")
                ]
                best = min((ms for ms in times if ms is not None), default=None)
                if best is not None:
                    axes.barh(at + shift, best, 0.36, color=colour, label=who if at == 0 else None)
            if row["target"][place]:
                axes.plot([row["target"][place]] * 2, [at - 0.42, at + 0.42], color="C3", linewidth=2)
        axes.set(title=told, xlabel="milliseconds; red: asked of one H200", xscale="log")
        axes.set_yticks(range(len(rows)), [row["row"] for row in rows], fontsize=8)
        _plain_numbers(axes.xaxis)
        axes.grid(alpha=0.25, axis="x")
    figure.axes[0].invert_yaxis()
    figure.axes[0].legend(fontsize=8, loc="lower right")
    return figure


def _lengths(rows: list[dict[str, Any]]) -> Any:
    """Times against length: the forms of lti_scan, and SSD beside softmax attention."""
    panels = [(begin, kind) for begin in (FORMS, AGAINST) for kind in KINDS if curves_of(rows, begin, kind)]
    if not panels:
        return None
    figure = _figure(5.2 * len(panels), 4.6)
    for axes, (begin, kind) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        found = curves_of(rows, begin, kind)
        for who, curve in found.items():
            axes.plot(list(curve), list(curve.values()), marker="o", markersize=4, label=who)
        lengths = sorted({length for curve in found.values() for length in curve})
        axes.set(
            title=f"{begin}\n{KINDS[kind]}",
            xlabel="sequence length T",
            ylabel="milliseconds",
            xscale="log",
            yscale="log",
        )
        axes.set_xticks(lengths, [str(length) for length in lengths], fontsize=7)
        axes.set_xticks([], minor=True)
        _plain_numbers(axes.yaxis)
        axes.grid(alpha=0.25, which="both")
        axes.legend(fontsize=8)
    return figure


def told_overtaking(rows: list[dict[str, Any]]) -> list[str]:
    """From which length on SSD is faster than softmax attention, one sentence per kind of call that was measured."""
    told = []
    for kind, name in KINDS.items():
        found = curves_of(rows, AGAINST, kind)
        ours, theirs = found.get("zoo triton"), found.get("sdpa_cudnn")
        if ours and theirs:
            last = max(set(ours) & set(theirs))
            told.append(
                f"SSD (E=4096, N=128) overtakes cuDNN attention of width 2048, {name}, at T = "
                f"{told_crossover(ours, theirs)}; at T = {last} it is {theirs[last] / ours[last]:.1f} times as fast."
            )
    return told

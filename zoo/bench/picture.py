"""The picture of a comparison: time against length for each kind of call."""

from __future__ import annotations

import io
from typing import Any

from zoo.bench.cases import KINDS
from zoo.bench.crossover import Curve, crossover, curves, told_crossover
from zoo.bench.store import Rows

MARKERS = "osD^vPX<>ph*"
COLOURS = tuple(f"C{index}" for index in range(10) if index != 7)  # grey and black are the baseline's
DASHES = ("-", "--", "-.")
UNITS = {"forward": "milliseconds per call", "train step": "milliseconds per call", "decode": "milliseconds per token"}


def draw(rows: Rows, baseline: str, title: str) -> bytes:
    """A PNG: one panel per kind of call, a ring where a mixer overtakes the baseline, the lengths in the legends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_kind = {kind: curves(rows, kind) for kind in KINDS}
    most = max([1, *(len(found) for found in by_kind.values())])
    figure = Figure(figsize=(16, 5.2 + 0.19 * most), layout="constrained")
    FigureCanvasAgg(figure)
    names = sorted({name for found in by_kind.values() for name in found} - {baseline})
    for axes, (kind, found) in zip(figure.subplots(1, len(KINDS)), by_kind.items(), strict=True):
        _panel(axes, kind, found, baseline, names)
    figure.suptitle(f"{title}\nring: from this length on faster than {baseline}; the legends say which", fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _panel(axes: Any, kind: str, found: dict[str, Curve], baseline: str, names: list[str]) -> None:
    against = found.get(baseline, {})
    if against:
        axes.plot(list(against), list(against.values()), color="black", linewidth=2.6, marker="o", label=baseline)
    for name, curve in found.items():
        if name == baseline:
            continue
        index = names.index(name)
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(
            list(curve), list(curve.values()), color=colour, linestyle=DASHES[index // len(COLOURS) % len(DASHES)],
            linewidth=1.4, marker=MARKERS[index % len(MARKERS)], markersize=4.5,
            label=_label(name, curve, against),
        )  # fmt: skip
        at = crossover(curve, against)
        if at is not None and at > min(set(curve) & set(against)):
            height = _height(against, at)
            axes.plot(
                [at], [height], "o", markersize=13, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=2
            )
            axes.axvline(at, color=colour, linestyle=":", linewidth=1, alpha=0.5)
    axes.set(title=kind, xlabel="sequence length T", ylabel=UNITS[kind], xscale="log", yscale="log")
    _number_axes(axes, sorted({length for curve in found.values() for length in curve}))
    axes.grid(alpha=0.25, which="both")
    if found:
        columns = 2 if len(found) > 4 else 1
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns, frameon=False)


def _label(name: str, curve: Curve, against: Curve) -> str:
    """The name, and from which length on it is faster than the baseline."""
    told = told_crossover(curve, against)
    if told == "-":
        return name
    if told.startswith(">"):
        return f"{name} (not up to T = {told[2:]})"
    return f"{name} (at every T)" if told.startswith("<=") else f"{name} (from T = {told})"


def _number_axes(axes: Any, lengths: list[int]) -> None:
    """Lengths as they were measured along the bottom, plain numbers at 1, 2 and 5 along the side."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _height(curve: Curve, at: float) -> float:
    """The curve at a length between its points, interpolated on log-log axes."""
    import numpy as np

    lengths, times = np.log(list(curve)), np.log(list(curve.values()))
    return float(np.exp(np.interp(np.log(at), lengths, times)))

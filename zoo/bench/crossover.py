"""Curves of time against length, and the length from which on a mixer is faster than the baseline."""

from __future__ import annotations

import math

from zoo.bench.store import Rows
from zoo.bench.timing import median

Curve = dict[int, float]  # T -> milliseconds


def curves(rows: Rows, kind: str) -> dict[str, Curve]:
    """mixer -> {T: median milliseconds} of one kind of call, both in rising order."""
    found: dict[str, Curve] = {}
    for row in rows.values():
        if row["kind"] == kind and row.get("samples_ms"):
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
    """The crossover in words: a length, `<= T` if it is below everywhere, `> T` if it never is, `-` without curves."""
    lengths = sorted(set(curve) & set(baseline))
    if not lengths:
        return "-"
    at = crossover(curve, baseline)
    if at is None:
        return f"> {lengths[-1]}"
    return f"<= {lengths[0]}" if at <= lengths[0] else f"{at:.0f}"

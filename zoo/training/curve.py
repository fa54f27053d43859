"""The picture of a training run: bits per byte against steps."""

from __future__ import annotations

import io
import math
from typing import Any


def draw_curve(records: list[dict[str, Any]], title: str) -> bytes:
    """A PNG with the training loss of each step and the held-out evaluations, both in bits per byte.

    records: one per step, with `step`, `loss` (nats per byte) and, where evaluated, `held_out_bits_per_byte`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [record["step"] for record in records]
    axes.plot(steps, [record["loss"] / math.log(2) for record in records], color="0.6", label="training, each step")
    evaluated = [record for record in records if "held_out_bits_per_byte" in record]
    axes.plot(
        [record["step"] for record in evaluated],
        [record["held_out_bits_per_byte"] for record in evaluated],
        "o-",
        color="tab:red",
        label="held-out files",
    )
    axes.set(xlabel="step", ylabel="bits per byte", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()

"""The picture of a training run: bits per byte, or per masked byte, against steps."""

from __future__ import annotations

import io
import math
from typing import Any

from zoo.training.objective import NEXT, in_words


def draw_curve(records: list[dict[str, Any]], title: str, measure: str = NEXT) -> bytes:
    """A PNG with the training loss of each step and the held-out evaluations, both in bits.

    records: one per step, with `step`, `loss` (nats) and, where evaluated, `held_out_<measure>`.
    measure: "bits_per_byte" or "bits_per_masked_byte", of both.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [record["step"] for record in records]
    axes.plot(steps, [record["loss"] / math.log(2) for record in records], color="0.6", label="training, each step")
    held_out = f"held_out_{measure}"
    evaluated = [record for record in records if held_out in record]
    axes.plot(
        [record["step"] for record in evaluated],
        [record[held_out] for record in evaluated],
        "o-",
        color="tab:red",
        label="held-out files",
    )
    axes.set(xlabel="step", ylabel=in_words(measure), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()

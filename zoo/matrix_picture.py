"""A picture of one mixing matrix and the ranks of its strictly lower blocks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-10  # of the block's largest singular value, float64 (MIXERS, T5)


def block_rank(block: Tensor) -> int:
    """Numerical rank of a float64 block: singular values above 1e-10 of its largest."""
    values = torch.linalg.svdvals(block)
    if values.numel() == 0 or float(values[0]) == 0.0:
        return 0
    return int((values > RANK_TOLERANCE * values[0]).sum())


def block_ranks(matrix: Tensor, count: int = 8) -> list[tuple[int, int]]:
    """(i, rank of M[i:, :i]) for about `count` rows i of a matrix [T,T]."""
    tokens = matrix.shape[0]
    rows = sorted({max(1, round(tokens * k / (count + 1))) for k in range(1, count + 1)})
    return [(row, block_rank(matrix[row:, :row])) for row in rows if row < tokens]


def draw_matrix(matrix: Tensor, ranks: list[tuple[int, int]], title: str, path: Path) -> None:
    """Write a PNG: log-magnitude of the matrix [T,T] beside the ranks of its strictly lower blocks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    size = matrix.abs()
    top = float(size.max()) or 1.0
    image = left.imshow((size / top).clamp_min(1e-6).log10().numpy(), cmap="viridis", vmin=-6, vmax=0)
    figure.colorbar(image, ax=left, label="log10 |M| / max |M|")
    left.set(title=title, xlabel="from token j", ylabel="to token i")
    right.plot([row for row, _ in ranks], [rank for _, rank in ranks], marker="o")
    right.set(title="rank of M[i:, :i]", xlabel="i", ylabel="rank", ylim=(0, None))
    right.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

"""Random projections of FAVOR+: rows that are standard normal each, and orthogonal to each other in blocks.

Source: Choromanski et al. 2021 (2009.14794), section 3.3. A QR decomposition gives an orthogonal matrix that is uniform
(Haar) only after its columns are multiplied by the signs of R's diagonal (Mezzadri 2007, math-ph/0609050): LAPACK
returns reflections, whose first entry is always negative, and features from such a matrix are biased by up to 24%.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.errors import ConfigError

NORMS = ("chi", "sqrt")


def draw_projection(
    rows: int,
    width: int,
    *,
    orthogonal: bool = True,
    norms: str = "chi",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A random projection [rows, width], drawn in float64 on the device of the generator (the CPU without one).

    orthogonal: blocks of `width` rows are orthogonal, the last one may be cut; False draws independent normal rows.
    norms: of orthogonal rows: "chi", those of independent normal rows, so that every row is standard normal; or "sqrt",
        width^1/2 each, which keeps only the expected square.
    generator: source of all random numbers; the global one if None.
    Raises ConfigError for unknown norms.
    """
    if norms not in NORMS:
        raise ConfigError(f"norms is {norms!r}, wanted one of {', '.join(NORMS)}")
    device = "cpu" if generator is None else generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)

    if not orthogonal:
        return normal(rows, width).to(dtype)
    blocks = -(-rows // width)
    directions = haar(normal(blocks, width, width)).flatten(0, 1)[:rows]
    lengths: Tensor | float = width**0.5 if norms == "sqrt" else normal(rows, width).norm(dim=1, keepdim=True)
    projection: Tensor = (directions * lengths).to(dtype)
    return projection


def haar(normal: Tensor) -> Tensor:
    """Orthogonal matrices [..., n, n], uniform over the orthogonal group, from standard normal ones."""
    q, r = torch.linalg.qr(normal)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    uniform: Tensor = q * signs.unsqueeze(-2)
    return uniform

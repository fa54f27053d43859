"""HiPPO matrices in diagonal plus low-rank form: initial values of A, B and P.

Source: Gu et al. 2020 (HiPPO), Gu, Goel & Re 2022 (S4), Gu et al. 2022 (S4D and "How to train your HiPPO"), Voelker et
al. 2019 (LMU). Everything here is float64 and runs once, when a mixer is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo_s4.config import MEASURES

B_CLIP = 2.0  # bound of Im B
BETA = {"lagt": 1.0, "tlagt": 1.0, "glagt": 0.01}  # Laguerre measures and their beta where none is given
FOURIER = {  # speed of the rotation, weight of the endpoint that is forgotten, weight of the one that is fed
    "fout": (1.0, 1.0, 1.0),
    "fourier2": (2.0, 2.0, 2.0),
    "fourier_decay": (1.0, 0.5, 0.5),
    "foud": (2.0, 0.0, 1.0),
}


@dataclass(frozen=True)
class Initial:
    """A = diag(a) - P P^* in the basis of its eigenvectors, one of each conjugate pair.

    a: [N/2], complex, Re <= 0 and Im <= 0. P: [R,N/2]. B: [N/2].
    """

    a: Tensor
    P: Tensor
    B: Tensor


def transition(measure: str, width: int, *, alpha: float = 0.0, beta: float | None = None) -> tuple[Tensor, Tensor]:
    """The matrices A [N,N] and B [N] of a measure, as it is defined.

    legs: scaled Legendre, the whole past; legsd: its normal part alone. legt: Legendre on a window, at half its time
    scale; lmu: the same at its full one, in Legendre polynomials that are not normalised. lagt, tlagt, glagt: Laguerre,
    exponentially weighted. fout, fourier2, fourier_decay: Fourier on a window of 2, of 1, and fading; foud: without
    the endpoint.
    beta: tilt of tlagt (1: none) and glagt (towards 0: lagt), > 0, and the factor of B in lagt; None: 1, or 0.01 in
        glagt. alpha: exponent of glagt's weight, -1 < alpha < 1.
    Raises ValueError for a measure or a number that is none of these.
    """
    if measure not in MEASURES:
        raise ValueError(f"no measure {measure!r}; there are: {', '.join(MEASURES)}")
    _expect_laguerre(measure, alpha, beta)
    n = torch.arange(width, dtype=torch.float64)
    row, column = n.unsqueeze(1), n.unsqueeze(0)
    root = (2 * n + 1).sqrt()
    if measure in ("legs", "legsd"):
        A = -(torch.outer(root, root) * (row > column) + torch.diag(n + 1))
        return (A, root) if measure == "legs" else (A + 0.5 * torch.outer(root, root), 0.5 * root)
    alternating = 1 - 2 * ((row - column).abs() % 2)
    if measure == "legt":
        return -0.5 * torch.outer(root, root) * torch.where(row < column, alternating, 1.0), 0.5 * root
    if measure == "lmu":
        return -torch.where(row < column, 1.0, alternating) * (2 * row + 1), (2 * n + 1) * alternating[0]
    if measure in BETA:
        return _laguerre(measure, n, alpha, BETA[measure] if beta is None else beta)
    return _fourier(measure, width)


def _laguerre(measure: str, n: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """1 below the diagonal, and on it what is between the measures; glagt in its own basis, 1 / scales."""
    identity = torch.eye(len(n), dtype=torch.float64)
    below = (n.unsqueeze(1) > n.unsqueeze(0)).double()
    if measure == "lagt":
        return -0.5 * identity - below, torch.full_like(n, beta)
    A = -0.5 * (1 + beta) * identity - below
    if measure == "tlagt":
        return A, torch.full_like(n, beta)
    scale = laguerre_norms(len(n), alpha)
    binomial = (torch.lgamma(n + alpha + 1) - torch.lgamma(n + 1) - math.lgamma(alpha + 1)).exp()
    fed = math.exp(-0.5 * math.lgamma(1 - alpha)) * beta ** ((1 - alpha) / 2)
    return A * scale / scale.unsqueeze(1), fed * binomial / scale


def _fourier(measure: str, width: int) -> tuple[Tensor, Tensor]:
    speed, forgotten, fed = FOURIER[measure]
    frequency = torch.zeros(width - 1, dtype=torch.float64)
    frequency[0::2] = speed * math.pi * torch.arange(width // 2, dtype=torch.float64)
    rotation = torch.diag(frequency, -1) - torch.diag(frequency, 1)
    B = fourier_endpoint(width)
    if measure == "foud":
        return rotation - 0.5 * torch.eye(width, dtype=torch.float64), B
    return rotation - forgotten * torch.outer(B, B), fed * B


def fourier_endpoint(width: int) -> Tensor:
    """Values of the Fourier basis at the newest point, [N]: 1, 0, sqrt 2, 0, sqrt 2, 0, ..."""
    B = torch.zeros(width, dtype=torch.float64)
    B[0::2] = math.sqrt(2)
    B[0] = 1
    return B


def laguerre_norms(width: int, alpha: float) -> Tensor:
    """Norms of the generalised Laguerre polynomials, sqrt(Gamma(n + alpha + 1) / n!), [N]."""
    n = torch.arange(width, dtype=torch.float64)
    return (0.5 * (torch.lgamma(n + alpha + 1) - torch.lgamma(n + 1))).exp()


def rescaling(measure: str, width: int, *, alpha: float = 0.0) -> Tensor:
    """s [N] such that diag(s) A diag(1/s) plus P^T P is normal, P from `correction`: 1 but for lmu and glagt.

    The state is s times the measure's own, B becomes s B, and a readout C becomes C / s.
    """
    n = torch.arange(width, dtype=torch.float64)
    if measure == "lmu":
        return (1 - 2 * (n % 2)) / (2 * n + 1).sqrt()
    return laguerre_norms(width, alpha) if measure == "glagt" else torch.ones_like(n)


def correction(measure: str, width: int, rank: int) -> Tensor:
    """P [R,N] such that A + P^T P is normal (a multiple of the identity plus a skew-symmetric matrix), A rescaled.

    Rows beyond the measure's rank are 0. Raises ValueError for a smaller `rank`.
    """
    n = torch.arange(width, dtype=torch.float64)
    odd = n % 2
    if measure == "legs":
        rows = (n + 0.5).sqrt().unsqueeze(0)
    elif measure == "legt":
        rows = (n + 0.5).sqrt() * torch.stack([odd, 1 - odd])
    elif measure == "lmu":
        rows = (2 * n + 1).sqrt() * torch.stack([odd, 1 - odd])
    elif measure in BETA:
        rows = torch.full((1, width), math.sqrt(0.5), dtype=torch.float64)
    elif MEASURES[measure] == 0:
        rows = torch.zeros(0, width, dtype=torch.float64)
    else:
        rows = math.sqrt(FOURIER[measure][1]) * fourier_endpoint(width).unsqueeze(0)
    if rank < len(rows):
        raise ValueError(f"the measure {measure!r} needs rank {len(rows)}, got {rank}")
    return torch.cat([rows, torch.zeros(rank - len(rows), width, dtype=torch.float64)])


def normal_plus_low_rank(
    measure: str, width: int, rank: int, *, alpha: float = 0.0, beta: float | None = None
) -> Initial:
    """A measure in the basis of the eigenvectors of its normal part; see `transition` and `tied_form`."""
    return tied_form(measure, width, rank, alpha=alpha, beta=beta)[0]


def tied_form(
    measure: str, width: int, rank: int, *, alpha: float = 0.0, beta: float | None = None
) -> tuple[Initial, Tensor]:
    """The measure as diag(a) - P P^* and the eigenvectors V [N,N/2], complex128, that belong to a.

    A rescaled state is 2 Re V h. Eigenvalues come from eigh of the skew part; of each pair, that with Im a <= 0 stays.
    Raises ValueError as `transition` and `correction` do.
    """
    A, B = transition(measure, width, alpha=alpha, beta=beta)
    P, scale = correction(measure, width, rank), rescaling(measure, width, alpha=alpha)
    A, B = scale.unsqueeze(1) * A / scale, scale * B
    normal = A + P.mT @ P
    real = normal.diagonal().mean().clamp(max=0)
    imag, vectors = torch.linalg.eigh(-0.5j * (normal - normal.mT))  # ascending
    half = width // 2
    imag, vectors = imag[:half].clone(), vectors[:, :half].clone()
    if imag[-1].abs() < 1e-6:  # Fourier has one pair of zeros, on its first two coordinates
        imag[-1] = 0.0
        vectors[:, -1] = 0
        vectors[:2, -1] = torch.tensor([1, 1j], dtype=vectors.dtype) / math.sqrt(2)
    inputs = vectors.mH @ B.to(vectors.dtype)
    size = inputs.abs()
    phase = torch.where(size > 1e-9, inputs / size.clamp(min=1e-9), torch.ones_like(inputs))
    vectors = vectors * phase  # of the free phases of eigenvectors, those that make B real
    B_rotated = vectors.mH @ B.to(vectors.dtype)
    B_rotated = torch.complex(B_rotated.real, B_rotated.imag.clamp(-B_CLIP, B_CLIP))
    P_rotated = P.to(vectors.dtype) @ vectors.conj()
    return Initial(torch.complex(real.expand(half), imag), P_rotated, B_rotated), vectors


def _expect_laguerre(measure: str, alpha: float, beta: float | None) -> None:
    if alpha != 0.0 and (measure != "glagt" or not -1 < alpha < 1):
        raise ValueError(f"alpha={alpha} with the measure {measure!r}; wanted one between -1 and 1, with 'glagt'")
    if beta is not None and (measure not in BETA or not 0 < beta < math.inf):
        raise ValueError(f"beta={beta} with the measure {measure!r}; wanted one above 0, with {', '.join(BETA)}")

"""Initial values of A, B and P: HiPPO matrices in diagonal plus low-rank form, and the diagonals that imitate them.

Source: Gu et al. 2020 (HiPPO), Gu, Goel & Re 2022 (S4), Gu et al. 2022 (S4D and "How to train your HiPPO").
Everything here is float64 and runs once, when a mixer is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo_s4.config import DIAGONALS, MEASURES

B_CLIP = 2.0  # bound of Im B


@dataclass(frozen=True)
class Initial:
    """A = diag(a) - P P^* in the basis of its eigenvectors, one of each conjugate pair.

    a: [N/2], complex, Re <= 0 and Im <= 0. P: [R,N/2]. B: [N/2].
    """

    a: Tensor
    P: Tensor
    B: Tensor


def initial_system(name: str, width: int, rank: int) -> Initial:
    """Initial values of one system of N = `width` states.

    name: a measure (its own P, rows beyond its rank are 0) or a diagonal (P complex normal, B = 1).
    Random draws (`rand`, P) come from torch's generator.
    """
    if name in MEASURES:
        return normal_plus_low_rank(name, width, rank)
    n = torch.arange(width // 2, dtype=torch.float64)
    real, imag = torch.full_like(n, 0.5), torch.zeros_like(n)
    if name == "lin":
        imag = math.pi * n
    elif name == "inv":
        imag = width / math.pi * (width / (2 * n + 1) - 1)
    elif name == "inv2":
        imag = width / math.pi * (width / (n + 1) - 1)
    elif name == "quad":
        imag = (2 * n + 1) ** 2 / math.pi
    elif name == "real":
        real = n + 1
    elif name == "rand":
        imag = torch.randn(n.shape, dtype=torch.float64).exp()
    else:
        raise ValueError(f"no initial system {name!r}; there are: {', '.join((*MEASURES, *DIAGONALS))}")
    P = torch.randn(rank, width // 2, dtype=torch.complex128)
    return Initial(torch.complex(-real, -imag), P, torch.ones(width // 2, dtype=torch.complex128))


def transition(measure: str, width: int) -> tuple[Tensor, Tensor]:
    """The HiPPO matrices A [N,N] and B [N] of a measure.

    legs: scaled Legendre, the whole past. legt: Legendre on a window, at half its time scale. lagt: Laguerre,
    exponentially weighted. fout: Fourier on a window.
    """
    n = torch.arange(width, dtype=torch.float64)
    row, column = n.unsqueeze(1), n.unsqueeze(0)
    if measure == "legs":
        root = (2 * n + 1).sqrt()
        below = torch.outer(root, root) * (row > column)
        return -(below + torch.diag(n + 1)), root
    if measure == "legt":
        root = (2 * n + 1).sqrt()
        sign = torch.where(row < column, 1 - 2 * ((row - column).abs() % 2), 1.0)
        return -0.5 * torch.outer(root, root) * sign, 0.5 * root
    if measure == "lagt":
        return 0.5 * torch.eye(width, dtype=torch.float64) - (row >= column).double(), torch.ones_like(n)
    frequency = torch.zeros(width - 1, dtype=torch.float64)
    frequency[0::2] = math.pi * torch.arange(width // 2, dtype=torch.float64)
    rotation = torch.diag(frequency, -1) - torch.diag(frequency, 1)
    B = fourier_endpoint(width)
    return rotation - torch.outer(B, B), B


def fourier_endpoint(width: int) -> Tensor:
    """Values of the Fourier basis at the newest point, [N]: 1, 0, sqrt 2, 0, sqrt 2, 0, ..."""
    B = torch.zeros(width, dtype=torch.float64)
    B[0::2] = math.sqrt(2)
    B[0] = 1
    return B


def correction(measure: str, width: int, rank: int) -> Tensor:
    """P [R,N] such that A + P^T P is normal: a multiple of the identity plus a skew-symmetric matrix."""
    n = torch.arange(width, dtype=torch.float64)
    if measure == "legs":
        rows = (n + 0.5).sqrt().unsqueeze(0)
    elif measure == "legt":
        odd = n % 2
        rows = (n + 0.5).sqrt() * torch.stack([odd, 1 - odd])
    elif measure == "lagt":
        rows = torch.full((1, width), math.sqrt(0.5), dtype=torch.float64)
    else:
        rows = fourier_endpoint(width).unsqueeze(0)
    if rank < len(rows):
        raise ValueError(f"the measure {measure!r} needs rank {len(rows)}, got {rank}")
    return torch.cat([rows, torch.zeros(rank - len(rows), width, dtype=torch.float64)])


def normal_plus_low_rank(measure: str, width: int, rank: int) -> Initial:
    """Diagonalise A + P^T P (eigenvalues by eigh of the skew part) and keep the half with Im a <= 0."""
    A, B = transition(measure, width)
    P = correction(measure, width, rank)
    normal = A + P.mT @ P
    real = normal.diagonal().mean()
    imag, vectors = torch.linalg.eigh(-0.5j * (normal - normal.mT))  # ascending
    half = width // 2
    imag, vectors = imag[:half].clone(), vectors[:, :half].clone()
    if imag[-1].abs() < 1e-6:  # fout has one pair of zeros, on its first two coordinates
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
    return Initial(torch.complex(real.expand(half), imag), P_rotated, B_rotated)

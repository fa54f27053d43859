"""S4's system: x' = (diag(a) - P P^*) x + B u under the bilinear transform, in float64.

A state is N/2 complex numbers, one of each conjugate pair; for the other half, P P^* acts on it as 2 P Re(P^* h). As N
real numbers (Re, Im of each in turn) the correction is 2 p p^T, so that A has a negative definite symmetric part and
its bilinear transform contracts: powers of it are safe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from zoo.ops.cauchy import cauchy_kernel


@dataclass(frozen=True)
class Dplr:
    """One system per channel, complex128 and float64.

    dt: [D,1] or [D,N/2], > 0. a: [D,N/2]. P: [R,D,N/2]. B: [D,N/2].
    """

    dt: Tensor
    a: Tensor
    P: Tensor
    B: Tensor


@dataclass(frozen=True)
class Step:
    """The discrete system h' = turn h - sum_r out_r Re <into_r, h> + feed u, all [D,N/2] or [R,D,N/2], complex."""

    turn: Tensor
    out: Tensor
    into: Tensor
    feed: Tensor


def discretise(system: Dplr) -> Step:
    """Bilinear: A' = (I - dt A/2)^-1 (I + dt A/2), B' = (I - dt A/2)^-1 dt B, in O(N R) numbers.

    With M = 2/dt - A and G = 1/(2/dt - a): M^-1 = G - G P (1/2 + Re P^* G P)^-1 Re P^* G (Woodbury), and then
    A' = 4 M^-1 / dt - 1 and B' = 2 M^-1 B.
    """
    G = 1.0 / (2.0 / system.dt - system.a)
    GP = G * system.P  # [R,D,N/2]
    read = system.P.conj() * G  # Re(read h) is P^* G h over both halves, halved
    core = torch.einsum("rdn,sdn->drs", read, system.P).real
    core = inverse(core + 0.5 * torch.eye(len(system.P), dtype=core.dtype, device=core.device))
    out = torch.einsum("rdn,drs->sdn", GP, core.to(GP.dtype))
    fed = torch.einsum("rdn,dn->rd", read, system.B).real
    feed = 2.0 * (G * system.B - (out * fed.unsqueeze(-1)).sum(0))
    return Step((2.0 / system.dt + system.a) * G, 4.0 * out, read / system.dt, feed)


def inverse(matrix: Tensor) -> Tensor:
    """Inverse of matrices [D,R,R] with a positive definite symmetric part, which needs no pivots.

    Gauss and Jordan's elimination in elementwise operations: `torch.linalg.inv` waits for the GPU, and a decode step
    in a CUDA graph cannot.
    """
    size = matrix.shape[-1]
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    rows = list(torch.cat([matrix, identity], -1).unbind(1))
    for i in range(size):
        rows[i] = rows[i] / rows[i][:, i : i + 1]
        for j in range(size):
            if j != i:
                rows[j] = rows[j] - rows[j][:, i : i + 1] * rows[i]
    return torch.stack(rows, 1)[..., size:]


def dense(step: Step) -> tuple[Tensor, Tensor]:
    """A' [D,N,N] and B' [D,N] of the state as N real numbers."""
    turn = torch.stack([step.turn.real, -step.turn.imag, step.turn.imag, step.turn.real], 1)  # [D,4,N/2]
    blocks = torch.diag_embed(turn).unflatten(1, (2, 2))  # [D,2,2,N/2,N/2]
    width = 2 * step.turn.shape[1]
    A = blocks.permute(0, 3, 1, 4, 2).reshape(-1, width, width)
    out = torch.view_as_real(step.out).flatten(2)  # [R,D,N]
    return A - torch.einsum("rdn,rdm->dnm", out, readout(step.into)), torch.view_as_real(step.feed).flatten(1)


def readout(row: Tensor) -> Tensor:
    """Rows [...,N/2] that read Re sum(row h), as rows [...,N] of the state as real numbers."""
    return torch.view_as_real(row.conj().resolve_conj()).flatten(-2)


def as_complex(row: Tensor) -> Tensor:
    """The inverse of `readout`."""
    return torch.view_as_complex(row.unflatten(-1, (-1, 2)).contiguous()).conj()


def power(A: Tensor, exponent: int) -> Tensor:
    """A^exponent for matrices [D,N,N], by squaring."""
    result: Tensor | None = None
    while exponent:
        if exponent & 1:
            result = A if result is None else result @ A
        exponent >>= 1
        if exponent:
            A = A @ A
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A) if result is None else result


def scaled(C: Tensor, A: Tensor, length: int) -> Tensor:
    """C (I - A'^length) for complex rows C [K,D,N/2] and A' [D,N,N]: what generates exactly `length` taps."""
    rows = readout(C).transpose(0, 1)  # [D,K,N]
    return as_complex((rows - rows @ power(A, length)).transpose(0, 1))


def unscaled(C: Tensor, A: Tensor, length: int) -> Tensor:
    """The C of C (I - A'^length), [K,D,N/2]."""
    rows = readout(C).transpose(0, 1)
    whole = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) - power(A, length)
    return as_complex(torch.linalg.solve(whole, rows, left=False).transpose(0, 1))


def lengthened(C: Tensor, A: Tensor, length: int, wanted: int) -> tuple[Tensor, int]:
    """C scaled for `length` taps as one scaled for at least `wanted`: times (I + A'^length), which doubles it."""
    if wanted <= length:
        return C, length
    rows, move = readout(C).transpose(0, 1), power(A, length)
    while length < wanted:
        rows = rows + rows @ move
        length *= 2
        if length < wanted:
            move = move @ move
    return as_complex(rows.transpose(0, 1)), length


def dplr_kernel(system: Dplr, C: Tensor, length: int, backend: str = "auto") -> Tensor:
    """The first `length` taps 2 Re C A'^l B' of each channel, float64 [K,D,length].

    C: complex [K,D,N/2], scaled for `length`. backend: of `cauchy_kernel`.

    The generating function at the nodes e^(-2i theta_k), theta_k = pi k / length, is
    e^(i theta) [r_CB - c r_CP (I + c r_PP)^-1 r_PB] with c = cos theta and r_XY = sum X Y dt / (2i sin theta - c dt a)
    over both halves: no pole for any k, so that the Nyquist node (c = 0) is as exact as the others.
    """
    k = torch.arange(length // 2 + 1, dtype=torch.float64, device=C.device)
    sin, cos = (math.pi / length * k).sin(), (math.pi / (2 * length) * (length - 2 * k)).sin()
    zero = torch.zeros_like(sin)
    left = torch.cat([system.B.unsqueeze(0), system.P])  # [1+R,D,N/2]
    right = torch.cat([C, system.P.conj()])  # [K+R,D,N/2]
    v = (left.unsqueeze(1) * right * system.dt).flatten(0, 1).transpose(0, 1)  # [D,(1+R)(K+R),N/2]
    sums = cauchy_kernel(
        torch.view_as_real(v.resolve_conj().contiguous()),
        torch.view_as_real((system.dt * system.a).resolve_conj().contiguous()),
        torch.stack([zero, 2 * sin], 1),
        torch.stack([cos, zero], 1),
        backend=backend,
    )
    r = torch.view_as_complex(sums).unflatten(1, (len(left), len(right)))  # [D,1+R,K+R,nodes]
    r = eliminated(r, cos, len(system.P))
    spectrum = torch.complex(cos, sin) * r[:, 0, : len(C)]
    taps: Tensor = torch.fft.irfft(spectrum, n=length)
    return taps.transpose(0, 1)


def eliminated(r: Tensor, cos: Tensor, rank: int) -> Tensor:
    """Take the correction out of r [D,1+R,K+R,nodes], one rank after the other (Sherman-Morrison each).

    Each pivot is 1 plus a number with a real part of at least 0, since A is dissipative.
    """
    for _ in range(rank):
        pivot = 1.0 + cos * r[:, -1:, -1:]
        r = r[:, :-1, :-1] - cos * r[:, -1:, :-1] * r[:, :-1, -1:] / pivot
    return r

"""Circular convolutions of real rows between complex transforms of half their length.

The n real numbers of a row are taken as n/2 complex ones, z_k = x_2k + i x_2k+1, so that the transform reads the row
where it lies. One kernel then makes the real spectra out of Z_f and Z_{n/2-f}, multiplies them, and packs the product
for the way back: no pass pads, unpacks, copies or scales on its own.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.rows import cdiv
from zoo.ops.long_convolution.fft import fft_length

BLOCK = 512


@triton.jit
def _spectrum(z_ptr, f, mirrored, cosine, sine, mask):
    """X_f and the conjugate of X_{n-f} of a packed row, each as a real and an imaginary part."""
    part = tl.arange(0, 2)[None, :]
    z_re, z_im = tl.split(tl.load(z_ptr + f[:, None] * 2 + part, mask=mask[:, None], other=0.0))
    m_re, m_im = tl.split(tl.load(z_ptr + mirrored[:, None] * 2 + part, mask=mask[:, None], other=0.0))
    even_re, even_im = 0.5 * (z_re + m_re), 0.5 * (z_im - m_im)
    odd_re, odd_im = 0.5 * (z_im + m_im), 0.5 * (m_re - z_re)
    turned_re, turned_im = cosine * odd_re - sine * odd_im, cosine * odd_im + sine * odd_re
    return even_re + turned_re, even_im + turned_im, even_re - turned_re, even_im - turned_im


@launched(do_not_specialize=["share", "terms"])
def product_kernel(
    a_ptr, b_ptr, turn_ptr, out_ptr,  # [rows terms,N,2], [rows terms / share,N,2], [N//2+1,2], [rows,N,2], all float32
    N, share, terms, scale,
    CONJUGATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK frequencies, and their mirror images, of one row.

    out = scale times the sum over `terms` rows of the product of the spectra of a and of b (CONJUGATE: of its
    conjugate), packed. `share` rows share a row of b.
    """
    across = (N // 2 + BLOCK) // BLOCK
    row = (tl.program_id(0) // across).to(tl.int64)
    f = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    mirrored = tl.where(f == 0, 0, N - f)
    mask = f <= N // 2
    part = tl.arange(0, 2)[None, :]
    cosine, sine = tl.split(tl.load(turn_ptr + f[:, None] * 2 + part, mask=mask[:, None], other=0.0))
    near_re = tl.zeros([BLOCK], tl.float32)
    near_im = tl.zeros([BLOCK], tl.float32)
    far_re = tl.zeros([BLOCK], tl.float32)
    far_im = tl.zeros([BLOCK], tl.float32)
    a_ptr += row * terms * N * 2
    b_ptr += row // share * terms * N * 2
    for _ in range(terms):
        a_re, a_im, c_re, c_im = _spectrum(a_ptr, f, mirrored, cosine, sine, mask)
        b_re, b_im, d_re, d_im = _spectrum(b_ptr, f, mirrored, cosine, sine, mask)
        if CONJUGATE:
            b_im, d_im = -b_im, -d_im
        near_re += a_re * b_re - a_im * b_im
        near_im += a_re * b_im + a_im * b_re
        far_re += c_re * d_re - c_im * d_im
        far_im += c_re * d_im + c_im * d_re
        a_ptr += N * 2
        b_ptr += N * 2
    half = 0.5 * scale
    even_re, even_im = half * (near_re + far_re), half * (near_im + far_im)
    rest_re, rest_im = half * (near_re - far_re), half * (near_im - far_im)
    odd_re, odd_im = cosine * rest_re + sine * rest_im, cosine * rest_im - sine * rest_re
    out_ptr += row * N * 2
    one = tl.join(even_re - odd_im, even_im + odd_re)
    other = tl.join(even_re + odd_im, odd_re - even_im)
    tl.store(out_ptr + f[:, None] * 2 + part, one, mask=mask[:, None])
    tl.store(out_ptr + mirrored[:, None] * 2 + part, other, mask=(mask & (mirrored != f))[:, None])


def transform(rows: Tensor) -> Tensor:
    """Rows [...,n] of real float32 numbers, n even -> their packed transform [...,n]."""
    return torch.view_as_real(torch.fft.fft(_packed(rows))).flatten(-2)


def back(packed: Tensor) -> Tensor:
    """n/2 times the inverse of `transform`."""
    return torch.view_as_real(torch.fft.ifft(_packed(packed), norm="forward")).flatten(-2)


def product(a: Tensor, b: Tensor, *, conjugate: bool, summed: bool = False) -> Tensor:
    """Packed transforms [D,B,n] of circular convolutions of a [D,B,n] with b [D,n], or of correlations with it.

    summed: b is [D,B,n] too, and the result [D,n] their sum over B. Divided by n/2, which `back` multiplies by.
    """
    D, B, n = a.shape
    rows, share, terms = (D, 1, B) if summed else (D * B, B, 1)
    out = torch.empty((D, n) if summed else (D, B, n), dtype=torch.float32, device=a.device)
    with on_device(a):
        product_kernel[(rows * cdiv(n // 4 + 1, BLOCK),)](
            a, b, _turns(n // 2, a.device), out, n // 2, share, terms, 2.0 / n,
            CONJUGATE=conjugate, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def convolve(u_n: Tensor, taps_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Circular convolutions [D,B,n] of u_n [D,B,n] with taps_n [D,n], and the packed transforms of both."""
    u_f, taps_f = transform(u_n), transform(taps_n)
    return back(product(u_f, taps_f, conjugate=False)), u_f, taps_f


def gradients(dy_n: Tensor, u_f: Tensor, taps_f: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [D,B,n] and [D,n] of what `convolve` convolved, from the transforms that it returned."""
    dy_f = transform(dy_n)
    du_n = back(product(dy_f, taps_f, conjugate=True))
    return du_n, back(product(dy_f, u_f, conjugate=True, summed=True))


def tap_gradient(u_t: Tensor, dy_t: Tensor, taps: int, ahead: int) -> Tensor:
    """Gradient [D,W] of W = `taps` taps, `ahead` of which look ahead, from u_t and dy_t [D,B,T] of any dtype."""
    tokens = u_t.shape[2]
    n = fft_length(max(tokens + max(taps - 1 - ahead, ahead), taps))
    dy_f, u_f = (transform(_padded(rows, n)) for rows in (dy_t, u_t))
    gradient_n = back(product(dy_f, u_f, conjugate=True, summed=True))
    return torch.cat([gradient_n[:, n - ahead :], gradient_n[:, : taps - ahead]], 1)


def _padded(rows: Tensor, n: int) -> Tensor:
    """rows [D,B,T] as float32, with zeros after them: [D,B,n]."""
    padded = torch.zeros((*rows.shape[:2], n), dtype=torch.float32, device=rows.device)
    padded[..., : rows.shape[2]] = rows
    return padded


def _packed(rows: Tensor) -> Tensor:
    return torch.view_as_complex(rows.unflatten(-1, (rows.shape[-1] // 2, 2)))


def _turns(N: int, device: torch.device) -> Tensor:
    """exp(-i pi f / N) for f = 0 .. N/2 as [N//2+1,2]."""
    angle = torch.arange(N // 2 + 1, dtype=torch.float64, device=device) * (math.pi / N)
    return torch.stack([angle.cos(), -angle.sin()], 1).float()

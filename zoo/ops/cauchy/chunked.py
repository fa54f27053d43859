"""Cauchy sums in plain PyTorch: the pole matrix once for all sums, then one real matrix product.

The matrix has N K complex numbers a channel. Channels are served in blocks of at most ELEMENTS of them, and where there
is more than one block, the backward makes each block's matrix again instead of keeping it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sequence_mixer.shapes import accumulation_dtype

ELEMENTS = 2**22


def cauchy_chunked(v: Tensor, w: Tensor, z: Tensor, q: Tensor | None) -> Tensor:
    """Arguments and result of `cauchy_kernel`."""
    channels, step = v.shape[0], max(1, ELEMENTS // max(1, w.shape[1] * z.shape[0]))
    if channels <= step:
        return _sums(v, w, z, q)
    blocks = []
    for block in zip(v.split(step), w.split(step), strict=True):
        blocks.append(checkpoint(_sums, *block, z, q, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(blocks)


def _sums(v: Tensor, w: Tensor, z: Tensor, q: Tensor | None) -> Tensor:
    """The sums of a block of channels.

    With a = 1/(z - q w) and b = 1/(z - q conj(w)), a pair is v a + conj(v) b = Re v (a + b) + Im v i (a - b): a product
    of real weights [R,2N] with a real matrix [2N,2K] that the R sums share.
    """
    acc = accumulation_dtype(v.dtype)
    poles = torch.view_as_complex(w.to(acc).contiguous()).unsqueeze(-1)
    nodes = torch.view_as_complex(z.to(acc).contiguous())
    near, far = poles, poles.conj()
    if q is not None:
        factors = torch.view_as_complex(q.to(acc).contiguous())
        near, far = factors * near, factors * far
    a, b = (nodes - near).reciprocal(), (nodes - far).reciprocal()  # [D,N,K]
    matrix = torch.cat([torch.view_as_real(a + b), torch.view_as_real(1j * (a - b))], 1).flatten(2)  # [D,2N,2K]
    weights = torch.cat([v[..., 0], v[..., 1]], 2).to(acc)  # [D,R,2N]
    y: Tensor = (weights @ matrix).unflatten(2, (-1, 2)).to(v.dtype)
    return y

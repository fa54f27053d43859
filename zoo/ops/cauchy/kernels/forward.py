"""Forward of the Cauchy sums."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.cauchy.kernels.poles import BLOCK_K, load_nodes, load_pairs, reciprocals
from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.rows import cdiv, next_power_of_2


@launched(do_not_specialize=["K"])
def _cauchy_fwd(
    v_ptr, w_ptr, z_ptr, q_ptr, y_ptr,  # [D,R,N,2] [D,N,2] [K,2] [K,2] -> [D,R,K,2], contiguous
    K, R: tl.constexpr, N: tl.constexpr, HAS_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns the R sums of one channel at BLOCK_K nodes, and visits the N pairs of poles in float64.

    Everything but the weights is shared by the R sums: two complex reciprocals and one division for each pair and node.
    """
    channel = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    in_k, in_r = k < K, r < R
    z_re, z_im, q_re, q_im = load_nodes(z_ptr, q_ptr, k, in_k, HAS_Q)  # [BLOCK_K]
    y_re = tl.zeros([BLOCK_R, BLOCK_K], tl.float64)
    y_im = tl.zeros([BLOCK_R, BLOCK_K], tl.float64)
    for n in range(N):
        w_re = tl.load(w_ptr + (channel * N + n) * 2).to(tl.float64)
        w_im = tl.load(w_ptr + (channel * N + n) * 2 + 1).to(tl.float64)
        v_re, v_im = load_pairs(v_ptr, (channel * R + r) * N + n, in_r, 0.0)  # [BLOCK_R]
        a_re, a_im, b_re, b_im = reciprocals(z_re, z_im, q_re, q_im, w_re, w_im)
        y_re += v_re[:, None] * (a_re + b_re)[None, :] - v_im[:, None] * (a_im - b_im)[None, :]
        y_im += v_re[:, None] * (a_im + b_im)[None, :] + v_im[:, None] * (a_re - b_re)[None, :]
    at = y_ptr + ((channel * R + r)[:, None] * K + k[None, :]) * 2
    inside = in_r[:, None] & in_k[None, :]
    tl.store(at, y_re.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(at + 1, y_im.to(y_ptr.dtype.element_ty), mask=inside)


def cauchy_forward(v: Tensor, w: Tensor, z: Tensor, q: Tensor | None) -> Tensor:
    """Launch the kernel; arguments and result as those of the custom operator."""
    D, R, N, _ = v.shape
    K = z.shape[0]
    v, w, z = v.contiguous(), w.contiguous(), z.contiguous()
    y = torch.empty((D, R, K, 2), dtype=v.dtype, device=v.device)
    with on_device(v):
        _cauchy_fwd[(D, cdiv(K, BLOCK_K))](
            v, w, z, z if q is None else q.contiguous(), y, K, R=R, N=N, HAS_Q=q is not None,
            BLOCK_R=next_power_of_2(R), BLOCK_K=BLOCK_K, num_warps=4,
        )  # fmt: skip
    return y

"""Backward of the Cauchy sums: another Cauchy sum, over the nodes."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zoo.ops.cauchy.kernels.poles import BLOCK_K, load_nodes, load_pairs, reciprocals
from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.rows import cdiv, next_power_of_2

BLOCK_N = 4


@launched(do_not_specialize=["K"])
def _cauchy_bwd(
    dy_ptr, v_ptr, w_ptr, z_ptr, q_ptr,  # [D,R,K,2] [D,R,N,2] [D,N,2] [K,2] [K,2], contiguous
    dv_ptr, dw_ptr,  # -> [D,R,N,2] [D,N,2]
    K, R: tl.constexpr, N: tl.constexpr, HAS_Q: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_N pairs of poles of one channel, for all R sums, and visits the nodes in float64.

    dv = sum_k dy conj(a) + conj(dy) b, and dw = sum_k conj(q a^2 conj(dy) v) + q b^2 conj(dy v), with a, b as in
    `reciprocals`.
    """
    channel = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    in_n = n < N
    w_re, w_im = load_pairs(w_ptr, channel * N + n, in_n, -1.0)  # [BLOCK_N]; -1 is no pole of ours
    dv_re = tl.zeros([BLOCK_N, BLOCK_R], tl.float64)
    dv_im = tl.zeros([BLOCK_N, BLOCK_R], tl.float64)
    dw_re = tl.zeros([BLOCK_N], tl.float64)
    dw_im = tl.zeros([BLOCK_N], tl.float64)
    for block in range(0, tl.cdiv(K, BLOCK_K).to(tl.int32)):
        k = (block * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        in_k = k < K
        z_re, z_im, q_re, q_im = load_nodes(z_ptr, q_ptr, k, in_k, HAS_Q)  # [BLOCK_K]
        a_re, a_im, b_re, b_im = reciprocals(
            z_re[None, :], z_im[None, :], q_re[None, :], q_im[None, :], w_re[:, None], w_im[:, None]
        )  # [BLOCK_N, BLOCK_K]
        rr = tl.zeros([BLOCK_N, BLOCK_K], tl.float64)  # sums over r of dy times v, part by part
        ii, ri, ir = rr, rr, rr
        for each in tl.static_range(R):
            g_re, g_im = load_pairs(dy_ptr, (channel * R + each) * K + k, in_k, 0.0)  # [BLOCK_K]
            v_re, v_im = load_pairs(v_ptr, (channel * R + each) * N + n, in_n, 0.0)  # [BLOCK_N]
            by_re = tl.sum((a_re + b_re) * g_re[None, :] + (a_im + b_im) * g_im[None, :], axis=1)
            by_im = tl.sum((a_re - b_re) * g_im[None, :] - (a_im - b_im) * g_re[None, :], axis=1)
            dv_re += tl.where((r == each)[None, :], by_re[:, None], 0.0)
            dv_im += tl.where((r == each)[None, :], by_im[:, None], 0.0)
            rr += g_re[None, :] * v_re[:, None]
            ii += g_im[None, :] * v_im[:, None]
            ri += g_re[None, :] * v_im[:, None]
            ir += g_im[None, :] * v_re[:, None]
        # q a^2 and q b^2
        aa_re, aa_im = a_re * a_re - a_im * a_im, 2.0 * a_re * a_im
        bb_re, bb_im = b_re * b_re - b_im * b_im, 2.0 * b_re * b_im
        a_re, a_im = q_re[None, :] * aa_re - q_im[None, :] * aa_im, q_re[None, :] * aa_im + q_im[None, :] * aa_re
        b_re, b_im = q_re[None, :] * bb_re - q_im[None, :] * bb_im, q_re[None, :] * bb_im + q_im[None, :] * bb_re
        near_re, near_im = a_re * (rr + ii) - a_im * (ri - ir), a_re * (ri - ir) + a_im * (rr + ii)
        far_re, far_im = b_re * (rr - ii) + b_im * (ri + ir), b_im * (rr - ii) - b_re * (ri + ir)
        dw_re += tl.sum(near_re + far_re, axis=1)
        dw_im += tl.sum(far_im - near_im, axis=1)
    at = (channel * R + r)[None, :] * N + n[:, None]
    inside = in_n[:, None] & (r < R)[None, :]
    tl.store(dv_ptr + at * 2, dv_re.to(dv_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at * 2 + 1, dv_im.to(dv_ptr.dtype.element_ty), mask=inside)
    at = channel * N + n
    tl.store(dw_ptr + at * 2, dw_re.to(dw_ptr.dtype.element_ty), mask=in_n)
    tl.store(dw_ptr + at * 2 + 1, dw_im.to(dw_ptr.dtype.element_ty), mask=in_n)


def cauchy_backward(dy: Tensor, v: Tensor, w: Tensor, z: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments and results as those of the custom operator."""
    D, R, N, _ = v.shape
    K = z.shape[0]
    dy, v, w, z = dy.contiguous(), v.contiguous(), w.contiguous(), z.contiguous()
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    with on_device(v):
        _cauchy_bwd[(D, cdiv(N, BLOCK_N))](
            dy, v, w, z, z if q is None else q.contiguous(), dv, dw, K, R=R, N=N, HAS_Q=q is not None,
            BLOCK_R=next_power_of_2(R), BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4,
        )  # fmt: skip
    return dv, dw

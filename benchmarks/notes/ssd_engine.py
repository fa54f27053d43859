"""SSD forward and backward, third set of prototypes: checks and times many variants in one run.

    python benchmarks/notes/ssd_engine.py            the whole run (GPU); JSON lines to $OUT/ssd_engine.json
    TRITON_INTERPRET=1 python ... --interpret        logic against zoo.ops.ssd in float64, on a CPU
    PYTHONPATH=<triton 3.6> python ... --offline     registers, stack, shared memory, HGMMA for sm_90, without a GPU

Notation. Chunks of Q tokens; s_i inclusive sums of log2 decays inside a chunk; r_j = s_j - log2 dt_j; e = the chunk's last s. S
[N,P] enters a chunk, R [N,P] is the gradient of the state that leaves it.

    y_i  = 2^s_i S^T C_i + sum_{j<=i} 2^(s_i-r_j) <C_i,B_j> x_j + D x_i          S' = 2^e S + sum_j 2^(e-r_j) B_j x_j^T
    dx_j = dt_j (2^(e-s_j) R^T B_j + sum_{i>=j} 2^(s_i-s_j) <C_i,B_j> dy_i) + D dy_j    R' = 2^e R + sum_i 2^s_i C_i dy_i^T
    dC   = sum_h 2^s dy_h S_h^T + (sum_h K_h) B,   K_h,ij = 2^(s_i-r_j) <dy_i,x_j>      (summed over heads BEFORE the product with B)
    dB   = sum_h 2^(e-r) x_h R_h^T + (sum_h K_h)^T C
    dlog a_t, t in a chunk = sum_{i>=t>j} K_ij <C_i,B_j> + sum_{i>=t} 2^s_i <C_i, S dy_i> + sum_{j<t} 2^(e-r_j) <B_j, R x_j> + 2^e <S,R>

The last line is direct: sums inside one chunk only, nothing cancels over the sequence. Row and column sums of one float32 tile
give its first term, so its cancellation inside a chunk is exact to float32.

Two numbers at B8 T4096 H64 P64 N128 G1 bf16 (M = 2.1e6 tokens x heads; x, y, dy, dx: 268 MB each; one set of bf16 states: 268 MB
at Q = 128, 537 MB at Q = 64; 4.27 TB/s; 400 TFLOP/s for small products, half the measured peak, is what the predictions use):

  design                                   HBM GB      kFLOP per token and head           floor by bytes   predicted ms
  forward 'single' (Q 64, 1 head)          0.56        QN2+QP2+NP4 = 57  -> 120 GFLOP     0.13 (L2 0.29)   0.45
  forward 'single' (Q 64, 2 heads)         0.56        49 -> 103 GFLOP                    0.13 (L2 0.19)   0.38
  forward 'split'  (sweep + outputs, 128)  0.54+0.80   16+16+16 (C B^T once) -> 103       0.31             0.42
     the same at 64                        0.80+1.07   16+16+8 -> 86                      0.44             0.52
  backward at 128: sweeps (one launch)     1.07        16+16 -> 69                        0.25             0.30
           values, dx (+ sums)             1.07        16+16 -> 69                        0.25             0.30
           values, K and pair sums         0.54        16 -> 34                           0.13             0.20
           keys, dC | dB side by side      1.07        16+16+16 -> 103                    0.25             0.33
           decays and sums                 0.12        -                                  0.03             0.05
           together                        3.9         131 -> 275                         0.91             1.18
     the same at 64                        5.4         115 -> 241                         1.27             1.45
     values in one launch                  -0.54       -                                  -0.13            spills: 134 of 3,109 instructions
  forward + backward, 'single' 2 heads + 128: 1.56 predicted; 'split' + 128: 1.60

Registers decide the shape of the backward: a [128,128] float32 tile is 64 KB of an SM's 256 KB. dB, dC, K, C B^T and the pair tile
together do not fit, so each launch holds one accumulator of that size, and dC and dB go to neighbouring programs (no operand but R,
for <S,R>, is read by both). One program for rows i (dC) and one for rows j (dB and dx) at Q = 64 spilled 100 to 290 instructions.

At B2 T16384 and B1 T65536 'single' has 128 and 64 programs; 'split' splits the sweep over N (no product needs all of N there) and
is parallel over chunks elsewhere: 0.45 and 0.85 predicted; the backward's grids are per chunk and do not change.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# ----------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def take(src, b, t, column, T, WIDTH: tl.constexpr, Q: tl.constexpr, W: tl.constexpr, TMA: tl.constexpr):
    """Rows t .. t+Q and W columns of [B,T,WIDTH], zeros beyond T. src: a pointer, or a descriptor with block [1,Q,W]."""
    if TMA:
        tile = tl.reshape(src.load([b.to(tl.int32), t, column]), [Q, W])
    else:
        i = tl.arange(0, Q)
        base = src + (b * T + t) * WIDTH + column
        tile = tl.load(base + i[:, None] * WIDTH + tl.arange(0, W)[None, :], mask=(i < T - t)[:, None], other=0.0)
    return tile


@triton.jit
def put(dst, tile, b, t, column, T, WIDTH: tl.constexpr, Q: tl.constexpr, W: tl.constexpr, TMA: tl.constexpr):
    """The counterpart of `take`."""
    if TMA:
        dst.store([b.to(tl.int32), t, column], tl.reshape(tile.to(dst.dtype), [1, Q, W]))
    else:
        i = tl.arange(0, Q)
        base = dst + (b * T + t) * WIDTH + column
        at = i[:, None] * WIDTH + tl.arange(0, W)[None, :]
        tl.store(base + at, tile.to(dst.dtype.element_ty), mask=(i < T - t)[:, None])


@triton.jit
def take_state(src, slot, N: tl.constexpr, P: tl.constexpr, TMA: tl.constexpr):
    """State `slot` of [slots,N,P]; a descriptor sees [slots*N,P] in blocks [N,P]."""
    if TMA:
        tile = src.load([(slot * N).to(tl.int32), 0])
    else:
        tile = tl.load(src + slot * N * P + tl.arange(0, N)[:, None] * P + tl.arange(0, P)[None, :])
    return tile


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def sums_kernel(
    dt_ptr, bias_ptr, A_ptr, s_ptr, r_ptr, T, CHUNKS, H, low, high,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """dt [B,T,H] raw -> s, r [B,H,CHUNKS*Q] float32. Beyond T: s stays, r = +inf (a time step of 0)."""
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    t = chunk * Q + tl.arange(0, Q)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    in_h = h < H
    live = (t < T)[:, None] & in_h[None, :]
    step = tl.load(dt_ptr + (b * T + t)[:, None] * H + h[None, :], mask=live, other=0.0).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias_ptr + h, mask=in_h, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        small = tl.exp(-tl.abs(step))
        up = 1.0 + small  # log1p: log(up) * small / (up - 1), and small itself where up rounds to 1
        log1p = tl.where(up == 1.0, small, tl.log(up) * (small / tl.where(up == 1.0, 1.0, up - 1.0)))
        step = tl.maximum(step, 0.0) + log1p
    step = tl.minimum(tl.maximum(step, low), high)
    step = tl.where(live, step, 0.0)
    rate = tl.load(A_ptr + h, mask=in_h, other=0.0).to(tl.float32) * 1.4426950408889634
    s = tl.cumsum(step * rate[None, :], axis=0)
    r = tl.where(step > 0.0, s - tl.log2(tl.where(step > 0.0, step, 1.0)), float("inf"))
    at = (b * H + h[None, :]) * (CHUNKS * Q) + t[:, None]
    tl.store(s_ptr + at, s, mask=in_h[None, :] & (t[:, None] >= 0))
    tl.store(r_ptr + at, r, mask=in_h[None, :] & (t[:, None] >= 0))


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def single_kernel(
    x_ptr, B_ptr, C_ptr, s_ptr, r_ptr, D_ptr, start_ptr, y_ptr, final_ptr, T, CHUNKS,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
    Q: tl.constexpr, HEADS: tl.constexpr, RUN: tl.constexpr, HAS_START: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One program walks RUN chunks (0: all) of HEADS heads, BP channels, with the state on chip.

    start_ptr: with HAS_START, the states [B,H,runs,N,P] that enter each run.
    """
    blocks: tl.constexpr = (H // HEADS) * (P // BP)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rest = tl.program_id(0) % blocks
    h = rest // (P // BP) * HEADS
    i = tl.arange(0, Q)
    n = tl.arange(0, N)
    p0 = rest % (P // BP) * BP
    p = p0 + tl.arange(0, BP)
    g = h // (H // G)
    first = 0
    last_chunk = CHUNKS
    if RUN > 0:
        first = tl.program_id(1) * RUN
        last_chunk = tl.minimum(first + RUN, CHUNKS)
    state_at = n[:, None] * P + p[None, :]
    if HAS_START:
        runs = tl.num_programs(1)
        S0 = tl.load(start_ptr + ((b * H + h) * runs + tl.program_id(1)) * N * P + state_at).to(tl.float32)
        S1 = tl.load(start_ptr + ((b * H + h + HEADS - 1) * runs + tl.program_id(1)) * N * P + state_at).to(tl.float32)
    else:
        S0 = tl.zeros([N, BP], tl.float32)
        S1 = tl.zeros([N, BP], tl.float32)
    sums = (b * H + h) * CHUNKS * Q
    d0 = tl.load(D_ptr + h).to(tl.float32)
    d1 = tl.load(D_ptr + h + HEADS - 1).to(tl.float32)
    seen = i[:, None] >= i[None, :]
    for chunk in range(first, last_chunk):
        t = chunk * Q + i
        C = take(C_ptr, b, chunk * Q, g * N, T, G * N, Q, N, TMA)
        B = take(B_ptr, b, chunk * Q, g * N, T, G * N, Q, N, TMA)
        x0 = take(x_ptr, b, chunk * Q, h * P + p0, T, H * P, Q, BP, TMA)
        s = tl.load(s_ptr + sums + t)
        r = tl.load(r_ptr + sums + t)
        e = tl.load(s_ptr + sums + chunk * Q + Q - 1)
        scores = tl.dot(C, tl.trans(B))
        if HEADS == 2:
            scores = scores.to(C.dtype)  # both states leave no registers for it in float32
        y = tl.dot(C, S0.to(C.dtype)) * tl.exp2(s)[:, None]
        w = scores * tl.exp2(tl.where(seen, s[:, None] - r[None, :], float("-inf")))
        w += tl.where(i[:, None] == i[None, :], d0, 0.0)  # the skip rides on the diagonal
        y = tl.dot(w.to(C.dtype), x0, acc=y)
        put(y_ptr, y, b, chunk * Q, h * P + p0, T, H * P, Q, BP, TMA)
        S0 = tl.dot(tl.trans(B), (x0 * tl.exp2(e - r)[:, None]).to(C.dtype), acc=S0 * tl.exp2(e))
        if HEADS == 2:
            x1 = take(x_ptr, b, chunk * Q, (h + 1) * P + p0, T, H * P, Q, BP, TMA)
            s = tl.load(s_ptr + sums + CHUNKS * Q + t)
            r = tl.load(r_ptr + sums + CHUNKS * Q + t)
            e = tl.load(s_ptr + sums + CHUNKS * Q + chunk * Q + Q - 1)
            y = tl.dot(C, S1.to(C.dtype)) * tl.exp2(s)[:, None]
            w = scores * tl.exp2(tl.where(seen, s[:, None] - r[None, :], float("-inf")))
            w += tl.where(i[:, None] == i[None, :], d1, 0.0)
            y = tl.dot(w.to(C.dtype), x1, acc=y)
            put(y_ptr, y, b, chunk * Q, (h + 1) * P + p0, T, H * P, Q, BP, TMA)
            S1 = tl.dot(tl.trans(B), (x1 * tl.exp2(e - r)[:, None]).to(C.dtype), acc=S1 * tl.exp2(e))
    if last_chunk == CHUNKS:
        at = (b * H + h) * P * N + p[None, :] * N + n[:, None]
        tl.store(final_ptr + at, S0)
        if HEADS == 2:
            tl.store(final_ptr + P * N + at, S1)


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def _sweep(
    value_ptr, key_ptr, s_ptr, r_ptr, start_ptr, states_ptr, end_ptr, b, h, n0, p0, T, CHUNKS,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    Q: tl.constexpr, EVERY: tl.constexpr, HAS_START: tl.constexpr, BACK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    j = tl.arange(0, Q)
    n = n0 + tl.arange(0, BN)
    p = p0 + tl.arange(0, BP)
    g = h // (H // G)
    sums = (b * H + h) * CHUNKS * Q
    outer_at = (b * H + h) * P * N + p[None, :] * N + n[:, None]
    if HAS_START:
        state = tl.load(start_ptr + outer_at).to(tl.float32)
    else:
        state = tl.zeros([BN, BP], tl.float32)
    for step in range(0, CHUNKS):
        chunk = step
        if BACK:
            chunk = CHUNKS - 1 - step
        if EVERY == 1:
            slot = (b * H + h) * CHUNKS + chunk
            if TMA:
                states_ptr.store([(slot * N + n0).to(tl.int32), p0], state.to(states_ptr.dtype))
            else:
                tl.store(states_ptr + slot * N * P + n[:, None] * P + p[None, :], state.to(states_ptr.dtype.element_ty))
        else:
            runs = (CHUNKS + EVERY - 1) // EVERY
            at = ((b * H + h) * runs + chunk // EVERY) * N * P + n[:, None] * P + p[None, :]
            wanted = n[:, None] < tl.where(chunk % EVERY == 0, N, 0)
            tl.store(states_ptr + at, state.to(states_ptr.dtype.element_ty), mask=wanted)
        t = chunk * Q + j
        key = take(key_ptr, b, chunk * Q, g * N + n0, T, G * N, Q, BN, TMA)
        value = take(value_ptr, b, chunk * Q, h * P + p0, T, H * P, Q, BP, TMA)
        e = tl.load(s_ptr + sums + chunk * Q + Q - 1)
        if BACK:
            factor = tl.exp2(tl.load(s_ptr + sums + t))
        else:
            factor = tl.exp2(e - tl.load(r_ptr + sums + t))
        state = tl.dot(tl.trans(key), (value * factor[:, None]).to(key.dtype), acc=state * tl.exp2(e))
    tl.store(end_ptr + outer_at, state)


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def sweep_kernel(
    x_ptr, dy_ptr, B_ptr, C_ptr, s_ptr, r_ptr, start_ptr, dend_ptr, S_ptr, R_ptr, end_ptr, dstart_ptr, T, CHUNKS,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    Q: tl.constexpr, EVERY: tl.constexpr, HAS_START: tl.constexpr, HAS_DEND: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """States [B,H,chunks,N,P] that enter the chunks (axis 1 of the grid: 0), gradients of those that leave (1).

    A program owns BN rows and BP columns of the state of one head; they do not depend on the others.
    """
    blocks: tl.constexpr = (N // BN) * (P // BP)
    b = (tl.program_id(0) // (H * blocks)).to(tl.int64)
    h = tl.program_id(0) // blocks % H
    n = tl.program_id(0) % blocks // (P // BP) * BN
    p = tl.program_id(0) % (P // BP) * BP
    if tl.program_id(1) == 0:
        _sweep(x_ptr, B_ptr, s_ptr, r_ptr, start_ptr, S_ptr, end_ptr, b, h, n, p, T, CHUNKS,
               H, G, N, P, BN, BP, Q, EVERY, HAS_START, False, TMA)  # fmt: skip
    else:
        _sweep(dy_ptr, C_ptr, s_ptr, r_ptr, dend_ptr, R_ptr, dstart_ptr, b, h, n, p, T, CHUNKS,
               H, G, N, P, BN, BP, Q, 1, HAS_DEND, True, TMA)  # fmt: skip


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def outputs_kernel(
    x_ptr, B_ptr, C_ptr, s_ptr, r_ptr, S_ptr, D_ptr, y_ptr, T, CHUNKS,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, BM: tl.constexpr, HB: tl.constexpr, HALF: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BM rows of one chunk for HB heads of a group: C B^T once, then one pass over the heads. HALF: keep it in half precision."""
    parts: tl.constexpr = (H // HB) * (Q // BM)
    b = (tl.program_id(0) // (CHUNKS * parts)).to(tl.int64)
    chunk = tl.program_id(0) // parts % CHUNKS
    m = tl.program_id(0) % (Q // BM)
    h0 = tl.program_id(0) % parts // (Q // BM) * HB
    g = h0 // (H // G)
    j = tl.arange(0, Q)
    i = m * BM + tl.arange(0, BM)
    tj = chunk * Q + j
    ti = chunk * Q + i
    C = take(C_ptr, b, chunk * Q + m * BM, g * N, T, G * N, BM, N, TMA)
    B = take(B_ptr, b, chunk * Q, g * N, T, G * N, Q, N, TMA)
    scores = tl.dot(C, tl.trans(B))
    if HALF:
        scores = scores.to(C.dtype)
    seen = i[:, None] >= j[None, :]
    for k in range(0, HB):
        h = h0 + k
        x = take(x_ptr, b, chunk * Q, h * P, T, H * P, Q, P, TMA)
        S = take_state(S_ptr, (b * H + h) * CHUNKS + chunk, N, P, TMA)
        sums = (b * H + h) * CHUNKS * Q
        si = tl.load(s_ptr + sums + ti)
        rj = tl.load(r_ptr + sums + tj)
        D = tl.load(D_ptr + h).to(tl.float32)
        y = tl.dot(C, S) * tl.exp2(si)[:, None]
        w = tl.exp2(tl.where(seen, si[:, None] - rj[None, :], float("-inf"))) * scores
        w += tl.where(i[:, None] == j[None, :], D, 0.0)  # the skip rides on the diagonal
        y = tl.dot(w.to(C.dtype), x, acc=y)
        put(y_ptr, y, b, chunk * Q + m * BM, h * P, T, H * P, BM, P, TMA)


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def values_kernel(
    x_ptr, dy_ptr, own_ptr, B_ptr, C_ptr, s_ptr, r_ptr, R_ptr, D_ptr, dx_ptr, K_ptr, row_ptr, col_ptr, kept_ptr, skip_ptr, T, CHUNKS,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, BK: tl.constexpr, HB: tl.constexpr, HALF: tl.constexpr, DX: tl.constexpr, PAIRS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One chunk, HB heads: dx, the sum over the heads of K^T [j,i] (float32), and the sums of pairs for the decays.

    row [B,H,T']: sum_j K_ij <C_i,B_j>. col, kept: sum_i and the state's part of <dxb_j, x_j>, without dt. skip: <dy_t, x_t>.
    BK: columns i at a time, Q or Q / 2. DX, PAIRS: what this launch makes: dx, kept and skip; K, row and col.
    """
    parts: tl.constexpr = H // HB
    b = (tl.program_id(0) // (CHUNKS * parts)).to(tl.int64)
    chunk = tl.program_id(0) // parts % CHUNKS
    h0 = tl.program_id(0) % parts * HB
    g = h0 // (H // G)
    j = tl.arange(0, Q)
    i0 = tl.arange(0, BK)
    i1 = Q - BK + tl.arange(0, BK)
    t = chunk * Q + j
    t0 = chunk * Q + i0
    t1 = chunk * Q + i1
    B = take(B_ptr, b, chunk * Q, g * N, T, G * N, Q, N, TMA)
    C0 = take(C_ptr, b, chunk * Q, g * N, T, G * N, BK, N, TMA)
    scores0 = tl.dot(B, tl.trans(C0))
    K0 = tl.zeros([Q, BK], tl.float32)
    if BK < Q:
        C1 = take(C_ptr, b, chunk * Q + BK, g * N, T, G * N, BK, N, TMA)
        scores1 = tl.dot(B, tl.trans(C1))
        K1 = tl.zeros([Q, BK], tl.float32)
    if HALF:
        scores0 = scores0.to(B.dtype)
        if BK < Q:
            scores1 = scores1.to(B.dtype)
    for k in range(0, HB):
        h = h0 + k
        sums = (b * H + h) * CHUNKS * Q
        x = take(x_ptr, b, chunk * Q, h * P, T, H * P, Q, P, TMA)
        dy0 = take(dy_ptr, b, chunk * Q, h * P, T, H * P, BK, P, TMA)
        e = tl.load(s_ptr + sums + chunk * Q + Q - 1)
        sj = tl.load(s_ptr + sums + t)
        step = tl.exp2(sj - tl.load(r_ptr + sums + t))
        si = tl.load(s_ptr + sums + t0)
        if DX:
            R = take_state(R_ptr, (b * H + h) * CHUNKS + chunk, N, P, TMA)
            dx = tl.dot(B, R) * tl.exp2(e - sj)[:, None]
            tl.store(kept_ptr + sums + t, tl.sum(dx * x.to(tl.float32), 1))
        w = tl.exp2(tl.where(i0[None, :] >= j[:, None], si[None, :] - sj[:, None], float("-inf")))
        if PAIRS:
            pairs = tl.dot(x, tl.trans(dy0)) * w
            col = tl.sum(pairs * scores0, 1)
            pairs = pairs * step[:, None]
            K0 += pairs
            tl.store(row_ptr + sums + t0, tl.sum(pairs * scores0, 0))
        if DX:
            dx = tl.dot((w * scores0).to(B.dtype), dy0, acc=dx)
        if BK < Q:
            dy1 = take(dy_ptr, b, chunk * Q + BK, h * P, T, H * P, BK, P, TMA)
            si = tl.load(s_ptr + sums + t1)
            w = tl.exp2(tl.where(i1[None, :] >= j[:, None], si[None, :] - sj[:, None], float("-inf")))
            if PAIRS:
                pairs = tl.dot(x, tl.trans(dy1)) * w
                col += tl.sum(pairs * scores1, 1)
                pairs = pairs * step[:, None]
                K1 += pairs
                tl.store(row_ptr + sums + t1, tl.sum(pairs * scores1, 0))
            if DX:
                dx = tl.dot((w * scores1).to(B.dtype), dy1, acc=dx)
        if PAIRS:
            tl.store(col_ptr + sums + t, col)
        if DX:
            if BK < Q:
                own = take(own_ptr, b, chunk * Q, h * P, T, H * P, Q, P, TMA).to(tl.float32)
            else:
                own = dy0.to(tl.float32)
            tl.store(skip_ptr + sums + t, tl.sum(own * x.to(tl.float32), 1))
            dx = dx * step[:, None] + tl.load(D_ptr + h).to(tl.float32) * own
            put(dx_ptr, dx, b, chunk * Q, h * P, T, H * P, Q, P, TMA)
    if PAIRS:
        at = tl.program_id(0).to(tl.int64) * Q * Q + j[:, None] * Q
        tl.store(K_ptr + at + i0[None, :], K0)
        if BK < Q:
            tl.store(K_ptr + at + i1[None, :], K1)


@triton.jit
def _keys(
    v_ptr, U_ptr, Z_ptr, s_ptr, r_ptr, M_ptr, R_ptr, K_ptr, dU_ptr, read_ptr, flow_ptr, b, chunk, h0, g, tile, place, T, CHUNKS,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, HB: tl.constexpr, SIDE_J: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, Q)
    t = chunk * Q + m
    dU = tl.zeros([Q, N], tl.float32)
    if not SIDE_J:
        U = take(U_ptr, b, chunk * Q, g * N, T, G * N, Q, N, TMA)
    for k in range(0, HB):
        h = h0 + k
        sums = (b * H + h) * CHUNKS * Q
        slot = (b * H + h) * CHUNKS + chunk
        v = take(v_ptr, b, chunk * Q, h * P, T, H * P, Q, P, TMA)
        M = take_state(M_ptr, slot, N, P, TMA)
        e = tl.load(s_ptr + sums + chunk * Q + Q - 1)
        if SIDE_J:
            vs = v * tl.exp2(e - tl.load(r_ptr + sums + t))[:, None]
        else:
            vs = v * tl.exp2(tl.load(s_ptr + sums + t))[:, None]
            tl.store(read_ptr + sums + t, tl.sum(tl.dot(U, M) * vs, 1))
            R = take_state(R_ptr, slot, N, P, TMA)
            flow = tl.sum(tl.sum(M.to(tl.float32) * R.to(tl.float32), 1), 0)
            tl.store(flow_ptr + slot, flow * tl.exp2(e))
        dU = tl.dot(vs.to(v.dtype), tl.trans(M), acc=dU)
    if SIDE_J:
        K = tl.load(K_ptr + tile * Q * Q + m[:, None] * Q + m[None, :])  # [j,i]
    else:
        K = tl.load(K_ptr + tile * Q * Q + m[None, :] * Q + m[:, None])  # [i,j]
    Z = take(Z_ptr, b, chunk * Q, g * N, T, G * N, Q, N, TMA)
    dU = tl.dot(K.to(Z.dtype), Z, acc=dU)
    put(dU_ptr, dU, place, chunk * Q, g * N, T, G * N, Q, N, False)


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def keys_kernel(
    x_ptr, dy_ptr, B_ptr, C_ptr, s_ptr, r_ptr, S_ptr, R_ptr, K_ptr, dB_ptr, dC_ptr, read_ptr, flow_ptr, T, CHUNKS,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, HB: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One chunk, HB heads. Even programs: dC, read [B,H,T'] = 2^s <C, S dy>, flow [B,H,chunks] = 2^e <S,R>. Odd ones: dB.

    dB and dC are parts [H/HB / G, B,T,G,N]. Neighbours share R in the L2 cache.
    """
    parts: tl.constexpr = H // HB
    per_group: tl.constexpr = parts // G
    tile = (tl.program_id(0) // 2).to(tl.int64)
    b = tile // (CHUNKS * parts)
    chunk = tl.program_id(0) // 2 // parts % CHUNKS
    part = tl.program_id(0) // 2 % parts
    h0 = part * HB
    g = h0 // (H // G)
    place = (part % per_group) * (tl.num_programs(0) // 2 // (CHUNKS * parts)) + b
    if tl.program_id(0) % 2 == 0:
        _keys(dy_ptr, C_ptr, B_ptr, s_ptr, r_ptr, S_ptr, R_ptr, K_ptr, dC_ptr, read_ptr, flow_ptr, b, chunk, h0, g, tile, place, T, CHUNKS,
              H, G, N, P, Q, HB, False, TMA)  # fmt: skip
    else:
        _keys(x_ptr, B_ptr, C_ptr, s_ptr, r_ptr, R_ptr, R_ptr, K_ptr, dB_ptr, read_ptr, flow_ptr, b, chunk, h0, g, tile, place, T, CHUNKS,
              H, G, N, P, Q, HB, True, TMA)  # fmt: skip


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def decays_kernel(
    dt_ptr, bias_ptr, A_ptr, s_ptr, r_ptr, row_ptr, col_ptr, kept_ptr, read_ptr, skip_ptr, flow_ptr, ddt_ptr, sums_ptr,
    T, CHUNKS, H, low, high, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """ddt [B,T,H] of the raw dt; sums [3,B,chunks,H] float32: of dA, of d dt_bias and of dD."""
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    t = chunk * Q + tl.arange(0, Q)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    in_h = h < H
    live = (t < T)[:, None] & in_h[None, :]
    at = (b * H + h[None, :]) * (CHUNKS * Q) + t[:, None]
    step = tl.exp2(tl.load(s_ptr + at, mask=live, other=0.0) - tl.load(r_ptr + at, mask=live, other=float("inf")))
    col = tl.load(col_ptr + at, mask=live, other=0.0)
    kept = tl.load(kept_ptr + at, mask=live, other=0.0)
    read = tl.load(read_ptr + at, mask=live, other=0.0)
    row = tl.load(row_ptr + at, mask=live, other=0.0)
    dstep = col + kept
    kept = kept * step
    change = tl.cumsum(row - col * step + read, axis=0, reverse=True) + (tl.cumsum(kept, axis=0) - kept)
    change += tl.load(flow_ptr + (b * H + h) * CHUNKS + chunk, mask=in_h, other=0.0)[None, :]
    change = tl.where(live, change, 0.0)
    dstep += change * tl.load(A_ptr + h, mask=in_h, other=0.0).to(tl.float32)[None, :]
    raw_at = (b * T + t)[:, None] * H + h[None, :]
    raw = tl.load(dt_ptr + raw_at, mask=live, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + h, mask=in_h, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        slope = 1.0 / (1.0 + tl.exp(-raw))
        reached = tl.maximum(raw, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(raw)))
    else:
        slope = 1.0
        reached = raw
    ddt = tl.where(live & (reached >= low) & (reached <= high), dstep * slope, 0.0)
    tl.store(ddt_ptr + raw_at, ddt.to(ddt_ptr.dtype.element_ty), mask=live)
    skip = tl.load(skip_ptr + at, mask=live, other=0.0)
    out = (b * CHUNKS + chunk) * H + h
    plane = tl.num_programs(0).to(tl.int64) * H
    tl.store(sums_ptr + out, tl.sum(change * step, 0), mask=in_h)
    tl.store(sums_ptr + plane + out, tl.sum(ddt, 0), mask=in_h)
    tl.store(sums_ptr + 2 * plane + out, tl.sum(skip, 0), mask=in_h)


# ------------------------------------------------------------------------------------------------------------------- host


class Problem:
    """Inputs of one call, and what the kernels hand to each other."""

    def __init__(self, x, dt, A, B, C, D, bias, dy, start=None, dend=None, softplus=True, limits=(0.0, float("inf"))):
        self.x, self.dt, self.A, self.B, self.C, self.D, self.bias, self.dy = x, dt, A, B, C, D, bias, dy
        self.start, self.dend, self.softplus, self.limits = start, dend, softplus, limits
        self.batch, self.T, self.H, self.P = x.shape
        self.G, self.N = B.shape[2:]

    def new(self, *shape, dtype=torch.float32):
        return torch.empty(shape, device=self.x.device, dtype=dtype)

    def sizes(self):
        return dict(H=self.H, G=self.G, N=self.N, P=self.P)

    def chunks(self, Q):
        return triton.cdiv(self.T, Q)

    def per_token(self, Q):
        return self.new(self.batch, self.H, self.chunks(Q) * Q)

    def rows(self, tensor, Q, W, TMA):
        """[B,T,...] as the kernels take it: itself, or a descriptor of [B,T,columns] with blocks of Q rows and W columns."""
        return TensorDescriptor.from_tensor(tensor.reshape(*tensor.shape[:2], -1), [1, Q, W]) if TMA else tensor

    def slots(self, tensor, TMA, BN=None, BP=None):
        return TensorDescriptor.from_tensor(tensor.reshape(-1, self.P), [BN or self.N, BP or self.P]) if TMA else tensor

    def states(self, count):
        return self.new(self.batch, self.H, count, self.N, self.P, dtype=self.x.dtype)

    def final(self):
        return self.new(self.batch, self.H, self.P, self.N)


def options(c):
    return dict(num_warps=c["warps"], num_stages=c["stages"])


def run_sums(p, Q):
    s, r = p.per_token(Q), p.per_token(Q)
    BH = min(16, triton.next_power_of_2(p.H))
    sums_kernel[(p.batch * p.chunks(Q), triton.cdiv(p.H, BH))](
        p.dt, p.bias, p.A, s, r, p.T, p.chunks(Q), p.H, *p.limits, p.bias is not None, p.softplus, Q, BH, num_warps=4
    )
    return s, r


def run_sweep(p, c, s, r, both=True, forward=True, every=1):
    """S, R, final state, gradient of the first state. both: R too, in the same launch."""
    Q, chunks, M = c["Q"], p.chunks(c["Q"]), c["TMA"]
    BN, BP = min(c["BN"], p.N), min(c["BP"], p.P)
    S, end = p.states(triton.cdiv(chunks, every)), p.final()
    R, dstart = (p.states(chunks), p.final()) if both else (S, end)
    sweep_kernel[(p.batch * p.H * (p.N // BN) * (p.P // BP), 2 if both else 1)](
        p.rows(p.x, Q, BP, M), p.rows(p.dy, Q, BP, M), p.rows(p.B, Q, BN, M), p.rows(p.C, Q, BN, M), s, r, p.start, p.dend,
        S if every > 1 else p.slots(S, M, BN, BP), p.slots(R, M, BN, BP), end, dstart, p.T, chunks, TMA=M,
        **p.sizes(), BN=BN, BP=BP, Q=Q, EVERY=every, HAS_START=p.start is not None, HAS_DEND=p.dend is not None, **options(c),
    )  # fmt: skip
    return S, R, end, dstart


def run_single(p, c, s, r, runs=None):
    """y and final state. c["RUN"]: chunks a run (0: all); then runs are the states that enter the runs."""
    y, end = torch.empty_like(p.x), p.final()
    Q, chunks, M = c["Q"], p.chunks(c["Q"]), c["TMA"]
    BP = min(c["BP"], p.P)
    count = triton.cdiv(chunks, c["RUN"]) if c["RUN"] else 1
    if not c["RUN"] and p.start is not None:
        runs = p.start.transpose(-1, -2).contiguous()  # [B,H,1,N,P]
    single_kernel[(p.batch * p.H // c["HEADS"] * (p.P // BP), count)](
        p.rows(p.x, Q, BP, M), p.rows(p.B, Q, p.N, M), p.rows(p.C, Q, p.N, M), s, r, p.D, runs, p.rows(y, Q, BP, M), end, p.T, chunks, TMA=M,
        **p.sizes(), BP=BP, Q=Q, HEADS=c["HEADS"], RUN=c["RUN"], HAS_START=runs is not None, **options(c),
    )  # fmt: skip
    return y, end


def run_outputs(p, c, s, r, S):
    y = torch.empty_like(p.x)
    HB, Q, BM, M = min(c["HB"], p.H // p.G), c["Q"], c["BM"], c["TMA"]
    outputs_kernel[(p.batch * p.chunks(c["Q"]) * (p.H // HB) * (c["Q"] // c["BM"]),)](
        p.rows(p.x, Q, p.P, M), p.rows(p.B, Q, p.N, M), p.rows(p.C, BM, p.N, M), s, r, p.slots(S, M), p.D, p.rows(y, BM, p.P, M),
        p.T, p.chunks(Q), TMA=M,
        **p.sizes(), Q=c["Q"], BM=c["BM"], HB=HB, HALF=c["HALF"], **options(c),
    )  # fmt: skip
    return y


def run_values(p, c, s, r, R):
    """dx, K, row, col, kept, skip."""
    Q, HB, M = c["Q"], min(c["HB"], p.H // p.G), c["TMA"]
    programs = p.batch * p.chunks(Q) * (p.H // HB)
    dx, K = torch.empty_like(p.x), p.new(programs, Q, Q)
    row, col, kept, skip = (p.per_token(Q) for _ in range(4))
    for DX, PAIRS in ((True, False), (False, True)) if c["TWO"] else ((True, True),):
        values_kernel[(programs,)](
            p.rows(p.x, Q, p.P, M), p.rows(p.dy, c["BK"], p.P, M), p.rows(p.dy, Q, p.P, M), p.rows(p.B, Q, p.N, M), p.rows(p.C, c["BK"], p.N, M),
            s, r, p.slots(R, M), p.D, p.rows(dx, Q, p.P, M), K, row, col, kept, skip, p.T, p.chunks(Q), TMA=M,
            **p.sizes(), Q=Q, BK=c["BK"], HB=HB, HALF=c["HALF"], DX=DX, PAIRS=PAIRS, **options(c),
        )  # fmt: skip
    return dx, K, row, col, kept, skip


def partials(p, per_group, count=2):
    """Where dB and dC go: in their own dtype if one program sums all heads, else in float32 parts."""
    return [p.new(per_group, p.batch, p.T, p.G, p.N, dtype=p.x.dtype if per_group == 1 else torch.float32) for _ in range(count)]


def gathered(p, parts):
    return parts[0] if parts.shape[0] == 1 else parts.sum(0).to(p.x.dtype)


def run_keys(p, c, s, r, S, R, K):
    """dB, dC in parts; read; flow. HB must be that of `run_values`, whose K has one tile per program."""
    Q, HB, M = c["Q"], min(c["HB"], p.H // p.G), c["TMA"]
    dB, dC = partials(p, p.H // p.G // HB)
    read, flow = p.per_token(Q), p.new(p.batch, p.H, p.chunks(Q))
    keys_kernel[(2 * p.batch * p.chunks(Q) * (p.H // HB),)](
        p.rows(p.x, Q, p.P, M), p.rows(p.dy, Q, p.P, M), p.rows(p.B, Q, p.N, M), p.rows(p.C, Q, p.N, M), s, r, p.slots(S, M), p.slots(R, M),
        K, dB, dC, read, flow, p.T, p.chunks(Q), TMA=M,
        **p.sizes(), Q=Q, HB=HB, **options(c),
    )  # fmt: skip
    return dB, dC, read, flow


def run_decays(p, Q, s, r, row, col, kept, read, skip, flow):
    """ddt, dA, dbias, dD."""
    chunks = p.chunks(Q)
    ddt, sums = torch.empty_like(p.dt), p.new(3, p.batch, chunks, p.H)
    BH = min(8, triton.next_power_of_2(p.H))
    decays_kernel[(p.batch * chunks, triton.cdiv(p.H, BH))](
        p.dt, p.bias, p.A, s, r, row, col, kept, read, skip, flow, ddt, sums,
        p.T, chunks, p.H, *p.limits, p.bias is not None, p.softplus, Q, BH, num_warps=4,
    )  # fmt: skip
    return ddt, *sums.sum((1, 2))


BASE = {
    64: {
        "sweep": dict(Q=64, BN=128, BP=64, warps=4, stages=2, TMA=False),
        "single": dict(Q=64, HEADS=1, BP=64, RUN=0, warps=4, stages=2, TMA=False),
        "outputs": dict(Q=64, BM=64, HB=16, HALF=False, warps=4, stages=2, TMA=False),
        "values": dict(Q=64, BK=64, HB=64, HALF=True, TWO=True, warps=4, stages=2, TMA=False),
        "keys": dict(Q=64, HB=64, warps=4, stages=2, TMA=False),
    },
    128: {
        "sweep": dict(Q=128, BN=128, BP=64, warps=4, stages=2, TMA=False),
        "single": dict(Q=128, HEADS=1, BP=64, RUN=0, warps=8, stages=2, TMA=False),
        "outputs": dict(Q=128, BM=128, HB=16, HALF=False, warps=8, stages=2, TMA=False),
        "values": dict(Q=128, BK=64, HB=64, HALF=True, TWO=True, warps=8, stages=2, TMA=False),
        "keys": dict(Q=128, HB=64, warps=8, stages=2, TMA=False),
    },
}


def forward(p, c):
    """c: {"single": ...} (with "sweep" if it has runs) or {"sweep": ..., "outputs": ...}."""
    if "single" in c:
        one = c["single"]
        s, r = run_sums(p, one["Q"])
        runs = None
        if one["RUN"]:
            runs = run_sweep(p, c["sweep"], s, r, both=False, every=one["RUN"])[0]
        return run_single(p, one, s, r, runs)
    s, r = run_sums(p, c["sweep"]["Q"])
    S, _, end, _ = run_sweep(p, c["sweep"], s, r, both=False)
    return run_outputs(p, c["outputs"], s, r, S), end


def backward(p, c):
    """c: {"sweep", "values", "keys"}; everything is recomputed from the inputs."""
    Q = c["sweep"]["Q"]
    s, r = run_sums(p, Q)
    S, R, _, dstart = run_sweep(p, c["sweep"], s, r)
    dx, K, row, col, kept, skip = run_values(p, c["values"], s, r, R)
    dB, dC, read, flow = run_keys(p, c["keys"], s, r, S, R, K)
    ddt, dA, dbias, dD = run_decays(p, Q, s, r, row, col, kept, read, skip, flow)
    return dict(x=dx, dt=ddt, A=dA, B=gathered(p, dB), C=gathered(p, dC), D=dD, bias=dbias, start=dstart)


# ------------------------------------------------------------------------------------------------------ checking and timing


def draw(batch, T, H=64, P=64, N=128, G=1, device="cuda", dtype=torch.bfloat16, seed=0, states=False):
    g = torch.Generator(device).manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, device=device, generator=g)
    A = -torch.exp(torch.rand(H, device=device, generator=g) * 2.77)
    given = [r(batch, T, H, P).to(dtype), (r(batch, T, H) - 1).to(dtype), A, r(batch, T, G, N).to(dtype), r(batch, T, G, N).to(dtype),
             r(H), r(H) * 0.5 - 3, r(batch, T, H, P).to(dtype)]  # fmt: skip
    return given + ([r(batch, H, P, N), r(batch, H, P, N)] if states else [])


def exact(given, softplus=True, limits=(0.0, float("inf"))):
    """y, final state and gradients in float64 by the plain path."""
    root = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
    sys.path[:0] = [root, os.path.join(root, "specs")]
    from zoo.ops.ssd import ssd

    names = ("x", "dt", "A", "B", "C", "D", "bias", "dy", "start", "dend")
    v = {name: t.double().requires_grad_(name not in ("dy", "dend")) for name, t in zip(names, given)}
    y, end = ssd(v["x"], v["dt"], v["A"], v["B"], v["C"], D=v["D"], dt_bias=v["bias"], dt_softplus=softplus, dt_limit=limits,
                 initial_state=v.get("start"), backend="chunked")  # fmt: skip
    loss = (y * v["dy"]).sum()
    if "dend" in v:
        loss = loss + (end * v["dend"]).sum()
    leaves = [name for name in v if v[name].requires_grad]
    grads = dict(zip(leaves, torch.autograd.grad(loss, [v[name] for name in leaves])))
    return {"y": y.detach(), "end": end.detach()} | {"d" + name: grad for name, grad in grads.items()}


def relative(a, e):
    return float((a.double() - e.to(a.device)).square().mean().sqrt() / e.square().mean().sqrt())


def plan(kind, c):
    """Forward and backward that hold this variant, everything else from BASE at its chunk."""
    base = BASE[c["Q"]]
    if kind == "single":
        return {"single": c, "sweep": c.get("sweep", base["sweep"])}, None
    if kind == "outputs":
        return {"sweep": base["sweep"], "outputs": c}, None
    if kind == "sweep":
        return {"sweep": c, "outputs": base["outputs"]}, {"sweep": c, "values": base["values"], "keys": base["keys"]}
    both = {k: base[k] | {"HB": c["HB"]} for k in ("values", "keys")}
    return None, {"sweep": base["sweep"]} | both | {kind: c}


def errors(p, expected, kind, c):
    ahead, back = plan(kind, c)
    found = {}
    if ahead:
        y, end = forward(p, ahead)
        found |= {"y": relative(y, expected["y"]), "end": relative(end, expected["end"])}
    if back:
        found |= {"d" + k: relative(v, expected["d" + k]) for k, v in backward(p, back).items() if "d" + k in expected}
    return found


def variants():
    """Kernel, configuration: what the offline compile found worth timing."""
    for TMA in (True, False):
        yield from candidates(TMA)


def candidates(TMA):
    for Q, HEADS, BP, RUN, warps, stages in (
        (64, 1, 64, 0, 4, 2), (64, 1, 64, 0, 4, 1), (64, 2, 64, 0, 4, 2), (64, 2, 64, 0, 4, 1), (128, 1, 64, 0, 8, 2), (64, 1, 32, 0, 4, 2),
        (64, 1, 64, 32, 4, 2), (64, 2, 64, 32, 4, 2), (64, 1, 64, 64, 4, 2),
    ):  # fmt: skip
        if TMA or (HEADS == 1 and RUN != 64):
            yield "single", dict(Q=Q, HEADS=HEADS, BP=BP, RUN=RUN, warps=warps, stages=stages, TMA=TMA)
    for Q, BN, BP, warps, stages in (
        (64, 128, 64, 4, 2), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3), (128, 128, 64, 4, 2), (128, 64, 64, 4, 2), (128, 64, 64, 4, 3),
        (128, 128, 64, 8, 2), (128, 128, 32, 4, 3),
    ):  # fmt: skip
        if TMA or BN == 128:
            yield "sweep", dict(Q=Q, BN=BN, BP=BP, warps=warps, stages=stages, TMA=TMA)
    for Q, BM, HB, HALF, warps, stages in (
        (128, 128, 16, True, 8, 2), (128, 128, 16, True, 8, 3), (128, 128, 64, True, 8, 2), (128, 128, 16, False, 8, 2), (128, 64, 16, True, 4, 2),
        (128, 64, 64, True, 4, 2), (128, 64, 16, False, 4, 2), (64, 64, 16, False, 4, 2), (64, 64, 16, True, 4, 3), (64, 64, 64, False, 4, 3),
    ):  # fmt: skip
        if TMA or HB == 16:
            yield "outputs", dict(Q=Q, BM=BM, HB=HB, HALF=HALF, warps=warps, stages=stages, TMA=TMA)
    for Q, BK, HB, TWO, warps, stages in (
        (128, 64, 64, True, 8, 2), (128, 64, 32, True, 8, 2), (128, 64, 64, False, 8, 2), (64, 64, 64, False, 4, 2), (64, 64, 64, True, 4, 2),
        (64, 64, 64, True, 4, 3), (128, 64, 16, True, 8, 2),
    ):  # fmt: skip
        if TMA or HB == 64:
            yield "values", dict(Q=Q, BK=BK, HB=HB, HALF=True, TWO=TWO, warps=warps, stages=stages, TMA=TMA)
    for Q, HB, warps, stages in ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2), (128, 16, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)):
        if TMA or HB == 64:
            yield "keys", dict(Q=Q, HB=HB, warps=warps, stages=stages, TMA=TMA)


ROWS = {
    "B8 T4096": (8, 4096, 128), "B16 T2048": (16, 2048, 128), "B2 T16384": (2, 16384, 128), "B1 T65536": (1, 65536, 128),
    "B8 T4096 N64": (8, 4096, 64),
}  # fmt: skip


def median(run):
    return triton.testing.do_bench(run, warmup=6, rep=24, return_mode="median")


def timed(p, kind, c):
    """Milliseconds of one kernel, its inputs random (its time does not depend on them). Sweep: [forward alone, both]."""
    Q = c["Q"]
    s, r = run_sums(p, Q)
    if kind == "single":
        count = triton.cdiv(p.chunks(Q), c["RUN"]) if c["RUN"] else 0
        runs = p.states(count).normal_() if count else None
        return median(lambda: run_single(p, c, s, r, runs))
    if kind == "sweep":
        return [median(lambda: run_sweep(p, c, s, r, both=False)), median(lambda: run_sweep(p, c, s, r))]
    S, R = p.states(p.chunks(Q)).normal_(), p.states(p.chunks(Q)).normal_()
    if kind == "outputs":
        return median(lambda: run_outputs(p, c, s, r, S))
    if kind == "values":
        return median(lambda: run_values(p, c, s, r, R))
    K = p.new(p.batch * p.chunks(Q) * (p.H // min(c["HB"], p.H // p.G)), Q, Q).normal_()
    return median(lambda: run_keys(p, c, s, r, S, R, K))


def check_child(indices, folder):
    """Compiles and checks some variants at both widths; prints one JSON line each."""
    cases = list(variants())
    data = torch.load(f"{folder}/exact.pt")
    for index in indices:
        kind, c = cases[index]
        print(json.dumps({"index": index, "begun": True}), flush=True)
        try:
            line = {"index": index, "errors": {}}
            for N, (given, expected) in data.items():
                line["errors"][N] = errors(Problem(*given), expected, kind, c)
            torch.cuda.synchronize()
        except Exception as error:  # the run goes on with the other variants
            line = {"index": index, "failed": f"{type(error).__name__} {error}"[:140].replace("\n", " ")}
            print(json.dumps(line), flush=True)
            if "illegal" in line["failed"].lower() or "AcceleratorError" in line["failed"]:
                return
            continue
        print(json.dumps(line), flush=True)


def time_child(indices, folder, until):
    """Times variants one after the other, row by row inside a variant; prints one JSON line each."""
    cases = list(variants())
    problems = {name: Problem(*draw(b, t, N=n)) for name, (b, t, n) in ROWS.items()}
    print(json.dumps({"ready": True}), flush=True)
    for index in indices:
        if time.time() > until:
            break
        kind, c = cases[index]
        line = {"index": index, "ms": {}}
        for name, p in problems.items():
            try:
                found = timed(p, kind, c)
                line["ms"][name] = [round(f, 4) for f in found] if isinstance(found, list) else round(found, 4)
            except Exception as error:
                line["ms"][name] = f"{type(error).__name__} {error}"[:90].replace("\n", " ")
                if "illegal" in line["ms"][name].lower():
                    print(json.dumps(line), flush=True)
                    return
        print(json.dumps(line), flush=True)


def whole_child(chosen):
    """Times whole forwards and forwards + backwards put together from the best kernels of each row."""
    for name, (b, t, n) in ROWS.items():
        p = Problem(*draw(b, t, N=n))
        out = {"row": name, "sums": round(median(lambda: run_sums(p, 64)), 4)}
        for label, c in chosen[name].items():
            try:
                if label.startswith("f "):
                    out[label] = round(median(lambda: forward(p, c)), 4)
                else:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    ahead = chosen[name]["f " + label.split(" ")[1]]
                    backward(p, c)
                    out[label + " MiB"] = (torch.cuda.max_memory_allocated() - before) >> 20
                    out[label] = round(median(lambda: (forward(p, ahead), backward(p, c))), 4)
            except Exception as error:
                out[label] = f"{type(error).__name__} {error}"[:90]
        print(json.dumps(out), flush=True)


def choose(results):
    """Per row: the fastest forward of both designs and, for every backward, the fastest of each part."""
    cases = list(variants())
    good = [(i, *cases[i]) for i, v in results.items() if "ms" in v and v.get("right")]

    def best(row, kind, fits=lambda c: True, which=None):
        """Milliseconds and configuration of the fastest right variant, or None."""
        found = []
        for i, k, c in good:
            ms = results[i]["ms"].get(row)
            ms = ms[which] if isinstance(ms, list) and which is not None else ms
            if k == kind and fits(c) and isinstance(ms, float):
                found.append((ms, i, c))
        return (min(found)[0], min(found)[2]) if found else None

    chosen = {}
    for row in ROWS:
        ahead, back = [], []
        if one := best(row, "single", lambda c: not c["RUN"]):
            ahead.append((one[0], "single", {"single": one[1]}))
        cut, sweep = best(row, "single", lambda c: c["RUN"]), best(row, "sweep", lambda c: c["Q"] == 64, 0)
        if cut and sweep:
            ahead.append((cut[0] + sweep[0], "runs", {"single": cut[1], "sweep": sweep[1]}))
        for Q in (64, 128):
            sweep, outputs, both = (best(row, k, lambda c: c["Q"] == Q, w) for k, w in (("sweep", 0), ("outputs", None), ("sweep", 1)))
            if sweep and outputs:
                ahead.append((sweep[0] + outputs[0], f"split{Q}", {"sweep": sweep[1], "outputs": outputs[1]}))
            for HB in (64, 32, 16):
                values, keys = (best(row, k, lambda c: c["Q"] == Q and c["HB"] == HB) for k in ("values", "keys"))
                if both and values and keys:
                    back.append((f"{Q}.{HB}", {"sweep": both[1], "values": values[1], "keys": keys[1]}))
        out = {f"f {label}": c for _, label, c in ahead}
        if ahead:
            out |= {f"fb {min(ahead, key=lambda a: a[0])[1]} {label}": c for label, c in back}
        chosen[row] = out
    return chosen


def lines_of(arguments, env, seconds, seen=None):
    process = subprocess.Popen([sys.executable, os.path.abspath(__file__), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=env)  # fmt: skip
    try:
        out, err = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return found, (err.strip().splitlines() or [""])[-1][:150]


def main(budget=145.0, workers=14):
    begin = time.time()
    left = lambda: budget - (time.time() - begin)
    folder = tempfile.mkdtemp()
    data = {}
    for N in (128, 64):
        given = draw(2, 600, N=N, seed=3)
        data[N] = (given, exact(given))
    torch.save(data, f"{folder}/exact.pt")
    del data
    torch.cuda.empty_cache()
    cases = list(variants())
    results = {i: {"kernel": kind, "config": c} for i, (kind, c) in enumerate(cases)}

    def check(indices):
        """One child after another until each of these variants was tried: a child may die."""
        todo = list(indices)
        while todo and left() > 60:
            found, err = lines_of(["--check", folder, json.dumps(todo)], os.environ, left() - 55)
            for line in found:
                results[line["index"]].update({k: v for k, v in line.items() if k not in ("index", "begun")})
            begun = [line["index"] for line in found if "begun" in line]
            for i in begun[-1:]:
                if "errors" not in results[i] and "failed" not in results[i]:
                    results[i]["failed"] = "died: " + err
            rest = [i for i in todo if i not in begun]
            if len(rest) == len(todo):
                for i in todo:
                    results[i]["failed"] = "not begun: " + err
                return
            todo = rest

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(check, [range(w, len(cases), workers) for w in range(workers)]))
    print(f"checked after {time.time() - begin:.0f} s", flush=True)
    for i, v in results.items():
        loose = ("dA", "dbias", "dD")  # sums over all tokens of terms of both signs
        found = [(e if e == e else 9e9, k) for by in v.get("errors", {}).values() for k, e in by.items()]
        v["worst"], v["where"] = max(found, default=(9e9, "-"))
        v["right"] = bool(found) and all(e < (3e-2 if k in loose else 8e-3) for e, k in found)
    todo = [i for i, v in results.items() if v["right"]]
    while todo and left() > 25:
        found, err = lines_of(["--time", folder, json.dumps(todo), str(begin + budget - 25)], os.environ, left() - 20)
        for line in found:
            if "index" in line:
                results[line["index"]]["ms"] = line["ms"]
        done = [line["index"] for line in found if "index" in line]
        if not done:
            print("timing stopped:", err)
            break
        todo = todo[todo.index(done[-1]) + 1 :]
    print(f"timed after {time.time() - begin:.0f} s; columns: {', '.join(ROWS)} (ms; sweep: forward alone, both)")
    for i, v in results.items():
        short = " ".join(f"{k}={w}" for k, w in v["config"].items())
        print(v["kernel"], short, "|", f"{v['worst']:.1e} {v['where']}", "ok" if v["right"] else "WRONG", "|", *(v.get("ms", {}).get(row, "-") for row in ROWS), v.get("failed", ""))
    chosen = choose(results)
    wholes, err = lines_of(["--whole", json.dumps(chosen)], os.environ, max(left(), 20))
    for line in wholes:
        print(json.dumps(line), flush=True)
    if len(wholes) < len(ROWS):
        print("wholes stopped:", err)
    out = os.environ.get("OUT", folder)
    with open(f"{out}/ssd_engine.json", "w") as file:
        json.dump({"variants": list(results.values()), "chosen": chosen, "wholes": wholes, "device": torch.cuda.get_device_name()}, file)
    print(f"{time.time() - begin:.0f} s")


# -------------------------------------------------------------------------------------------------- without a GPU: logic


def interpret():
    """Every kernel in float32 against float64, values and gradients, under the interpreter."""
    worst = 0.0
    for T, H, G, N, P, states, softplus, limits in (
        (130, 4, 2, 16, 16, True, True, (0.0, float("inf"))),
        (64, 2, 1, 16, 16, False, True, (0.05, 0.4)),
        (70, 2, 1, 32, 16, True, False, (0.0, float("inf"))),
    ):  # fmt: skip
        given = draw(2, T, H, P, N, G, device="cpu", dtype=torch.float32, states=states)
        if not softplus:
            given[1] = given[1].abs() * 0.2 + 3.0
            given[6] = given[6] * 0 - 3.0
        expected = exact(given, softplus, limits)
        p = Problem(*given, **({} if states else {"start": None, "dend": None}), softplus=softplus, limits=limits)
        small = dict(warps=4, stages=1, TMA=len(sys.argv) > 2)
        cases = []
        for Q in (16, 32):
            sweep = dict(Q=Q, BN=N // 2, BP=P // 2, **small)
            HB = 2 if H // G == 2 else 1
            for HEADS in (1, 2):
                for BP, RUN in ((P, 0), (P // 2, 3)):
                    cases.append(({"single": dict(Q=Q, HEADS=HEADS, BP=BP, RUN=RUN, **small), "sweep": sweep}, None))
            for BM, part in ((Q, HB), (Q // 2, 1)):
                cases.append(({"sweep": sweep, "outputs": dict(Q=Q, BM=BM, HB=part, HALF=BM == Q, **small)}, None))
            for BK, part in ((Q, HB), (Q // 2, 1)):
                values = dict(Q=Q, BK=BK, HB=part, HALF=True, TWO=BK == Q, **small)
                cases.append((None, {"sweep": sweep, "values": values, "keys": dict(Q=Q, HB=part, **small)}))
        for ahead, back in cases:
            found = {}
            if ahead:
                y, end = forward(p, ahead)
                found |= {"y": relative(y, expected["y"]), "end": relative(end, expected["end"])}
            if back:
                found |= {"d" + k: relative(v, expected["d" + k]) for k, v in backward(p, back).items() if "d" + k in expected}
            high = max((e if e == e else 9e9) * (0.1 if k == "dA" else 1.0) for k, e in found.items())  # dA cancels
            worst = max(worst, high)
            print(T, H, G, list((ahead or back).keys()), (ahead or back)["sweep"]["Q"], f"{high:.1e}", found if high > 1e-5 else "", flush=True)
    print("worst", worst)
    return worst > 1e-5


# ----------------------------------------------------------------------------------------------- without a GPU: the compiler


def compiled(kernel, const, given, warps, stages):
    """Registers, stack, shared memory and matrix instructions of one kernel for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in const else given.get(name, "*fp32") for name in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in names if signature[n].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in const.items()}, attrs)
    begin = time.time()
    k = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, num_stages=stages))
    took = time.time() - begin
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(k.asm["cubin"])
        file.flush()
        usage = subprocess.run([f"{tools}/cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        sass = subprocess.run([f"{tools}/nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    labels, spans, lines = {}, [], sass.splitlines()
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = number
        elif (jump := re.search(r"BRA.*\((\.L_x_\d+)\)", line)) and jump[1] in labels:
            spans.append((labels[jump[1]], number))
    first, last = max(spans, key=lambda span: span[1] - span[0], default=(0, 0))  # the loop over chunks or heads
    inner = sum("STL" in line or "LDL" in line for line in lines[first:last])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    return dict(registers=int(found[1]), stack=int(found[2]), shared=k.metadata.shared, hgmma=sass.count("HGMMA"),
                hmma=len(re.findall(r"\bHMMA", sass)), local=sass.count("STL") + sass.count("LDL"), local_in_loop=inner, loop=last - first, seconds=round(took, 1))  # fmt: skip


def offline(kind, c, N=128, H=64, G=1, P=64, what=(True, True)):
    """Compiles one variant with bfloat16 inputs."""
    Q, M, tail = c["Q"], c["TMA"], (c["warps"], c["stages"])
    rows = lambda q, w: f"tensordesc<bf16[1, {q}, {w}]>" if M else "*bf16"
    slot = lambda n, w: f"tensordesc<bf16[{n}, {w}]>" if M else "*bf16"
    size = dict(H=H, G=G, N=N, P=P, Q=Q, TMA=M)
    given = {"T": "i32", "CHUNKS": "i32", "x_ptr": rows(Q, P), "dy_ptr": rows(Q, P), "B_ptr": rows(Q, N), "C_ptr": rows(Q, N),
             "S_ptr": slot(N, P), "R_ptr": slot(N, P), "y_ptr": rows(Q, P), "dx_ptr": rows(Q, P), "own_ptr": rows(Q, P)}  # fmt: skip
    part = "*bf16" if c.get("HB", H) == H else "*fp32"
    given |= {"dB_ptr": part, "dC_ptr": part, "dU_ptr": part}
    if kind == "single":
        BP = c["BP"]
        given |= {"x_ptr": rows(Q, BP), "y_ptr": rows(Q, BP), "start_ptr": "*bf16"}
        const = size | dict(BP=BP, HEADS=c["HEADS"], RUN=c["RUN"], HAS_START=c["RUN"] > 0)
        return compiled(single_kernel, const if c["RUN"] else const | {"start_ptr": None}, given, *tail)
    if kind == "sweep":
        BN, BP = min(N, c["BN"]), c["BP"]
        given |= {"x_ptr": rows(Q, BP), "dy_ptr": rows(Q, BP), "B_ptr": rows(Q, BN), "C_ptr": rows(Q, BN), "S_ptr": slot(BN, BP), "R_ptr": slot(BN, BP)}
        const = dict(BN=BN, BP=BP, EVERY=1, HAS_START=False, HAS_DEND=False, start_ptr=None, dend_ptr=None)
        return compiled(sweep_kernel, size | const, given, *tail)
    if kind == "outputs":
        given |= {"C_ptr": rows(c["BM"], N), "y_ptr": rows(c["BM"], P)}
        return compiled(outputs_kernel, size | dict(BM=c["BM"], HB=c["HB"], HALF=c["HALF"]), given, *tail)
    if kind == "values":
        given |= {"C_ptr": rows(c["BK"], N), "dy_ptr": rows(c["BK"], P)}
        return compiled(values_kernel, size | dict(BK=c["BK"], HB=c["HB"], HALF=c["HALF"], DX=what[0], PAIRS=what[1]), given, *tail)
    if kind == "keys":
        return compiled(keys_kernel, size | dict(HB=c["HB"]), given, *tail)


if __name__ == "__main__":
    mode = sys.argv[1] if len(sys.argv) > 1 else ""
    if mode == "--check":
        check_child(json.loads(sys.argv[3]), sys.argv[2])
    elif mode == "--time":
        time_child(json.loads(sys.argv[3]), sys.argv[2], float(sys.argv[4]))
    elif mode == "--whole":
        whole_child(json.loads(sys.argv[2]))
    elif mode == "--interpret":
        sys.exit(interpret())
    elif mode == "--offline":
        for kind, c in variants():
            if len(sys.argv) < 3 or kind in sys.argv[2].split(","):
                for what in ((True, False), (False, True)) if c.get("TWO") else ((True, True),):
                    try:
                        found = offline(kind, c, N=int(sys.argv[3]) if len(sys.argv) > 3 else 128, what=what)
                    except Exception as error:
                        found = f"{type(error).__name__} {error}"[-200:]
                    print(kind, *(f"{k}={v}" for k, v in c.items()), "|", found, flush=True)
    else:
        main()

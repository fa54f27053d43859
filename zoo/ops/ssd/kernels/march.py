"""SSD forward by the march: a walk in short steps, on states [P,N], with the scores of all heads made beforehand."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import dot
from zoo.ops.semiseparable.kernels.chunks import place_of, store_sums

MOST = tl.constexpr(127.0)  # log2 of a weight; it is finite where there is none, and the scores are 0 there


@triton.jit
def _scores(
    B_ptr, C_ptr, scores_ptr, chunk, group, first, live, B_stride, C_stride,
    G: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """<C_i,B_j> of one chunk and group, [j,i], 0 for j > i."""
    i = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    wanted = (i < live)[:, None] & (n < N)[None, :]
    column = group * N + n[None, :]
    B = tl.load(B_ptr + first * B_stride + (i[:, None] * B_stride + column), mask=wanted, other=0.0)
    C = tl.load(C_ptr + first * C_stride + (i[:, None] * C_stride + column), mask=wanted, other=0.0)
    scores = tl.where(i[:, None] <= i[None, :], dot(B, tl.trans(C)), 0.0)
    at = (chunk.to(tl.int64) * G + group) * (Q * Q) + (i[:, None] * Q + i[None, :])
    tl.store(scores_ptr + at, scores.to(scores_ptr.dtype.element_ty))


@launched(do_not_specialize=["T", "PER_SEQUENCE", "COUNT"])
def before_kernel(
    dt_ptr, bias_ptr, A_ptr, B_ptr, C_ptr, table_ptr,  # [B,T,H] [H] [H] [B,T,G,N] twice
    s_ptr, r_ptr, scores_ptr,  # -> [H,count,Q] twice, [count,G,Q,Q]
    T, PER_SEQUENCE, COUNT, stride, B_stride, C_stride, low, high,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTPLUS: tl.constexpr,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Axis 1 of the grid: the scores of each group, then s and r of BLOCK_H heads each."""
    chunk = tl.program_id(0)
    part = tl.program_id(1)
    first, live = place_of(chunk, table_ptr, T, PER_SEQUENCE, Q, PACKED)
    if part < G:
        _scores(B_ptr, C_ptr, scores_ptr, chunk, part, first, live, B_stride, C_stride, G, N, Q, BLOCK_N)
    else:
        h = (part - G) * BLOCK_H + tl.arange(0, BLOCK_H)
        store_sums(dt_ptr, bias_ptr, A_ptr, s_ptr, r_ptr, chunk, h, first, live, stride, COUNT, low, high,
                   H, HAS_BIAS, HAS_SOFTPLUS, Q, False)  # fmt: skip


@triton.jit
def state_part(ptr, row, column, N: tl.constexpr, WIDTH: tl.constexpr, in_rows, HAS_START: tl.constexpr):
    """Columns from `column` on of states whose rows begin at `row`; zeros without any, from loads that are masked out.

    Constants that a product accumulates upon are no load, and make ptxas 12.8 wait after each instruction of products.
    """
    n = column + tl.arange(0, WIDTH)
    wanted = in_rows[:, None] & (n < N)[None, :]
    if not HAS_START:
        wanted = wanted & (row[:, None] < tl.program_id(1))  # never
    return tl.load(ptr + row[:, None] * N + n[None, :], mask=wanted, other=0.0)


@triton.jit
def keep_part(ptr, row, column, N: tl.constexpr, WIDTH: tl.constexpr, in_rows, state):
    n = column + tl.arange(0, WIDTH)
    tl.store(ptr + row[:, None] * N + n[None, :], state, mask=in_rows[:, None] & (n < N)[None, :])


@triton.jit
def modes(ptr, first, live, stride, column, i, width, W: tl.constexpr, EVEN: tl.constexpr, ALL: tl.constexpr):
    """Rows `i` of a chunk and W columns from `column` on of B or C, of which `width` exist; EVEN: all rows do."""
    n = tl.arange(0, W)
    at = ptr + (first * stride + column) + (i[:, None] * stride + n[None, :])
    if EVEN and ALL:
        part = tl.load(at)
    elif ALL:
        part = tl.load(at, mask=(i < live)[:, None], other=0.0)
    else:
        part = tl.load(at, mask=(i < live)[:, None] & (n < width)[None, :], other=0.0)
    return part


@triton.jit
def weights(s, r, scores, i, D, HAS_D: tl.constexpr):
    """2^(s_i - r_j) scores [j,i], with the skip on the diagonal."""
    w = tl.exp2(tl.minimum(s[None, :] - r[:, None], MOST)) * scores
    if HAS_D:
        w += tl.where(i[:, None] == i[None, :], D, 0.0)
    return w


@launched(do_not_specialize=["T", "PER_SEQUENCE", "COUNT"])
def march_kernel(
    x_ptr, B_ptr, C_ptr, s_ptr, r_ptr, scores_ptr, D_ptr,  # [B,T,H,P] [B,T,G,N] twice, as of `before_kernel`, [H]
    start_ptr, cu_ptr, first_ptr,  # [S,H,P,N] float32, int [S+1] twice: where sequences begin, in tokens and in chunks
    y_ptr, final_ptr,  # -> [B,T,H,P] [S,H,P,N] float32
    T, PER_SEQUENCE, COUNT, x_stride, B_stride, C_stride,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_START: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr, SAME: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """y^T = (S C^T) 2^s + x^T w, then S = 2^e S + (x 2^(e-r))^T B, chunk after chunk; w_ji = 2^(s_i-r_j) <C_i,B_j> + D.

    One program owns ROWS channels of a sequence: of one head, or all of HEADS = 2. Its state lies in PARTS tiles of
    WIDTH columns. EVEN: every chunk is full. SAME: the strides of B and C are one. OVERLAP: x^T w comes first, so that
    the product that fills S runs on until then; else it is added to the rest by its own product.
    """
    tl.static_assert(HEADS == 1 or (HEADS == 2 and ROWS == 2 * P), "rows of one head, or two whole heads")
    tl.static_assert(PARTS <= 2, "one tile or two")
    blocks: tl.constexpr = H // HEADS * ((P * HEADS + ROWS - 1) // ROWS)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(0) % blocks // (blocks // (H // HEADS)) * HEADS
    p0 = tl.program_id(0) % (blocks // (H // HEADS)) * ROWS
    group = h // (H // G)
    i = tl.arange(0, Q)
    p = tl.arange(0, ROWS)
    second = p >= P  # of HEADS = 2
    in_rows = p0 + p < P * HEADS
    if SAME:
        C_stride = B_stride
    if PACKED:
        begin = tl.load(cu_ptr + sequence).to(tl.int64)
        tokens = (tl.load(cu_ptr + sequence + 1).to(tl.int64) - begin).to(tl.int32)
        chunk = tl.load(first_ptr + sequence).to(tl.int64)
    else:
        begin = sequence * T
        tokens = T
        chunk = sequence * PER_SEQUENCE
    D = 0.0
    D1 = 0.0
    if HAS_D:
        D = tl.load(D_ptr + h)
        D1 = tl.load(D_ptr + h + HEADS - 1)
    row = (sequence * H + h) * P + p0 + p
    if HAS_START:
        begin_ptr = start_ptr
    else:
        begin_ptr = s_ptr
    state0 = state_part(begin_ptr, row, 0, N, WIDTH, in_rows, HAS_START)
    if PARTS > 1:
        state1 = state_part(begin_ptr, row, WIDTH, N, WIDTH, in_rows, HAS_START)
    sums = (h.to(tl.int64) * COUNT + chunk) * Q
    other: tl.constexpr = HEADS == 2
    # Sums that y waits for feed no product, so the compiler would not fetch them ahead.
    ahead = tl.load(s_ptr + (h.to(tl.int64) * COUNT + tl.minimum(chunk, COUNT - 1)) * Q + i)
    if other:
        ahead1 = tl.load(s_ptr + ((h + 1).to(tl.int64) * COUNT + tl.minimum(chunk, COUNT - 1)) * Q + i)

    count = (tokens + Q - 1) // Q
    for step in range(0, count):
        first = begin + step * Q
        live = tokens - step * Q
        at = sums + step * Q
        later = tl.where(step + 1 < count, Q, 0)
        grown = tl.exp2(ahead)[None, :]
        ahead = tl.load(s_ptr + at + later + i)
        if other:
            grown = tl.where(second[:, None], tl.exp2(ahead1)[None, :], grown)
            ahead1 = tl.load(s_ptr + at + COUNT * Q + later + i)
        else:
            grown = tl.broadcast_to(grown, [ROWS, Q])
        x = modes(x_ptr, first, live, x_stride, h * P + p0, i, P * HEADS - p0, ROWS, EVEN, P * HEADS % ROWS == 0)
        scores = tl.load(scores_ptr + ((chunk + step) * G + group) * (Q * Q) + (i[:, None] * Q + i[None, :]))
        s = tl.load(s_ptr + at + i)
        r = tl.load(r_ptr + at + i)
        whole = tl.load(s_ptr + at + Q - 1)
        w = weights(s, r, scores, i, D, HAS_D).to(x.dtype)
        if OVERLAP:
            inside = dot(tl.trans(x), w)
        factor = tl.exp2(whole - r)[:, None]
        kept = tl.exp2(whole)
        if other:
            s1 = tl.load(s_ptr + at + COUNT * Q + i)
            r1 = tl.load(r_ptr + at + COUNT * Q + i)
            whole1 = tl.load(s_ptr + at + COUNT * Q + Q - 1)
            w1 = weights(s1, r1, scores, i, D1, HAS_D).to(x.dtype)
            if OVERLAP:
                inside = tl.where(second[:, None], dot(tl.trans(x), w1), inside)
            factor = tl.where(second[None, :], tl.exp2(whole1 - r1)[:, None], factor)
            kept = tl.where(second, tl.exp2(whole1), kept)[:, None]
        moved = tl.trans((x * factor).to(x.dtype))

        C0 = modes(C_ptr, first, live, C_stride, group * N, i, N, WIDTH, EVEN, N % WIDTH == 0)
        y = dot(state0.to(x.dtype), tl.trans(C0))
        if PARTS > 1:
            C1 = modes(C_ptr, first, live, C_stride, group * N + WIDTH, i, N - WIDTH, WIDTH, EVEN, N % WIDTH == 0)
            y = dot(state1.to(x.dtype), tl.trans(C1), y)
        if OVERLAP:
            y = tl.fma(y, grown, inside)  # of a sum Triton would make y the accumulator of `inside`
        else:
            y *= grown
            inside = dot(tl.trans(x), w, y)
            if other:
                inside = tl.where(second[:, None], dot(tl.trans(x), w1, y), inside)
            y = inside

        B0 = modes(B_ptr, first, live, B_stride, group * N, i, N, WIDTH, EVEN, N % WIDTH == 0)
        state0 *= kept
        if PARTS > 1:
            state1 *= kept
        state0 = dot(moved, B0, state0)
        if PARTS > 1:
            B1 = modes(B_ptr, first, live, B_stride, group * N + WIDTH, i, N - WIDTH, WIDTH, EVEN, N % WIDTH == 0)
            state1 = dot(moved, B1, state1)
        out = y_ptr + (first * H + h) * P + p0 + (i[:, None] * (H * P) + p[None, :])
        y = tl.trans(y).to(y_ptr.dtype.element_ty)
        if EVEN and P * HEADS % ROWS == 0:
            tl.store(out, y)
        else:
            tl.store(out, y, mask=(i < live)[:, None] & in_rows[None, :])
    keep_part(final_ptr, row, 0, N, WIDTH, in_rows, state0)
    if PARTS > 1:
        keep_part(final_ptr, row, WIDTH, N, WIDTH, in_rows, state1)

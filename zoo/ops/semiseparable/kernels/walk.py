"""The walk: one program goes along a whole sequence with its state in registers, for half precision inputs."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.primitives import INTERPRETED, dot
from zoo.ops.semiseparable.kernels.decay import token_range


@triton.jit
def mixed(a, b, acc, OPERAND: tl.constexpr):
    """acc + a [M,K] @ b [K,N] in float32, where one of the two is a float32 intermediate.

    Beside bfloat16 it is rounded to bfloat16; beside float16 both are multiplied as TF32, which holds every float16
    value and the range of states that float16 does not have.
    """
    if tl.bfloat16 == OPERAND:
        if INTERPRETED:
            a, b = a.to(OPERAND).to(tl.float32), b.to(OPERAND).to(tl.float32)
            result = tl.dot(a, b, acc=acc, input_precision="ieee")
        else:
            result = tl.dot(a.to(OPERAND), b.to(OPERAND), acc=acc)
    else:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), acc=acc, input_precision="tf32")
    return result


@triton.jit
def chunk_tile(ptr, first, stride_t, column, in_seq, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Tile [CHUNK, BLOCK] of tokens from `first` on; zeros outside. One 64 bit base, small offsets."""
    base = ptr + first * stride_t
    offset = tl.arange(0, CHUNK)[:, None] * stride_t + column[None, :]
    if WIDTH % BLOCK == 0:
        mask = in_seq[:, None]
    else:
        mask = in_seq[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + offset, mask=mask, other=0.0)


@triton.jit
def numbers(ptr, first, head, stride_t, stride_h, in_seq, CHUNK: tl.constexpr):
    """Numbers [CHUNK] of one head, of tokens from `first` on; zeros outside."""
    base = ptr + first * stride_t + head * stride_h
    return tl.load(base + tl.arange(0, CHUNK) * stride_t, mask=in_seq, other=0.0)


@launched(do_not_specialize=["T", "slots"])
def walk_kernel(
    query_ptr, key_ptr, value_ptr,  # [BT,HQ,N] [BT,HK,N] [BT,HV,P]
    s_ptr, r_ptr, slot_ptr, skip_ptr,  # [H,slots,CHUNK] float32, int [S] if PACKED: first slots of sequences; [H]
    row_ptr, weight_ptr, shift_ptr,  # [BT,H] by strides, float32: factors of rows and of keys, what scores are moved by
    start_ptr, start_vector_ptr,  # [S,H,N,P] by strides, [S,H,N] or [S,H,P] by stride; float32
    cu_ptr,  # int [S+1]
    out_ptr, end_ptr, end_vector_ptr,  # [BT,H,P] contiguous, and as the starts
    factor, eps, T, slots,
    query_t, query_h, key_t, key_h, value_t, value_h, row_t, row_h, weight_t, weight_h, shift_t, shift_h,
    start_h, start_n, start_p, start_vector_h, start_vector_x, end_h, end_n, end_p, end_vector_h, end_vector_x,
    H: tl.constexpr, JQ: tl.constexpr, JK: tl.constexpr, JV: tl.constexpr,  # heads that share a query, key, value
    N: tl.constexpr, P: tl.constexpr,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_SKIP: tl.constexpr,
    SCALED: tl.constexpr,  # "rows" or "keys" are multiplied by `factor`, or ""
    NORMALISE: tl.constexpr, HAS_ROW: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    SHIFTED: tl.constexpr,  # scores are moved by a number per "rows" or per "keys", or ""
    HAS_START: tl.constexpr, HAS_START_VECTOR: tl.constexpr, STORE_END: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """out_i = a_i sum_{j<=i} 2^(s_i - r_j) (<q_i, k_j> + b) w_j v_j (+ D v_i); j >= i, 2^(s_j - r_i) if REVERSE.

    One program owns BLOCK_P channels of one (sequence, head): the state sum_j w_j k_j v_j^T stays in registers.
    b is b_i or b_j (SHIFTED); the part of it that lies before the chunk is a second, small state sum_j (b_j) w_j v_j.
    NORMALISE: a_i = factor / (factor sum_{j<=i} <q_i, k_j> + eps), which is also written to row_ptr.
    """
    tl.static_assert(not (NORMALISE and (HAS_DECAY or HAS_WEIGHT or SHIFTED != "")), "sums of plain scores alone")
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    sequence = (tl.program_id(0) // (H * blocks)).to(tl.int64)
    head = (tl.program_id(0) // blocks % H).to(tl.int64)
    column = tl.program_id(0) % blocks
    start, end, slot = token_range(sequence, cu_ptr, T, CHUNK, PACKED)
    step = tl.arange(0, CHUNK)
    n = tl.arange(0, BLOCK_N)
    p = column * BLOCK_P + tl.arange(0, BLOCK_P)
    in_state = (n < N)[:, None] & (p < P)[None, :]
    query_ptr += head // JQ * query_h
    key_ptr += head // JK * key_h
    value_ptr += head // JV * value_h
    if HAS_START:
        start_at = (sequence * H + head) * start_h + n[:, None] * start_n + p[None, :] * start_p
        state = tl.load(start_ptr + start_at, mask=in_state, other=0.0)  # [BLOCK_N, BLOCK_P]
    else:
        state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if NORMALISE:
        x = n
        in_vector = n < N
    else:
        x = p
        in_vector = p < P
    if NORMALISE or SHIFTED != "":
        if HAS_START_VECTOR:
            vector_at = (sequence * H + head) * start_vector_h + x * start_vector_x
            vector = tl.load(start_vector_ptr + vector_at, mask=in_vector, other=0.0)
        else:
            vector = tl.where(in_vector, 0.0, 0.0)
    if HAS_DECAY and PACKED:
        slot = tl.load(slot_ptr + sequence).to(tl.int64)
    if HAS_SKIP:
        skip = tl.load(skip_ptr + head).to(tl.float32)
    if REVERSE:
        seen = step[:, None] <= step[None, :]
    else:
        seen = step[:, None] >= step[None, :]

    chunks = ((end - start + CHUNK - 1) // CHUNK).to(tl.int32)
    for count in range(0, chunks):
        if REVERSE:
            chunk = chunks - 1 - count
        else:
            chunk = count
        first = start + chunk * CHUNK
        left = (end - first).to(tl.int32)  # tokens from here to the end
        in_seq = step < left
        query = chunk_tile(query_ptr, first, query_t, n, in_seq, N, CHUNK, BLOCK_N)
        key = chunk_tile(key_ptr, first, key_t, n, in_seq, N, CHUNK, BLOCK_N)
        value = chunk_tile(value_ptr, first, value_t, p, in_seq, P, CHUNK, BLOCK_P)

        scores = dot(query, tl.trans(key))  # [CHUNK, CHUNK]
        zeros = tl.zeros([CHUNK, BLOCK_P], tl.float32)
        out = mixed(query, state, zeros, OPERAND)  # [CHUNK, BLOCK_P]
        if HAS_DECAY:
            sums = (head * slots + slot + chunk) * CHUNK
            s = tl.load(s_ptr + sums + step)
            r = tl.load(r_ptr + sums + step)
            whole = tl.load(s_ptr + sums + CHUNK - 1)
            if REVERSE:
                out *= tl.exp2(whole - r)[:, None]
                apart = s[None, :] - r[:, None]
            else:
                out *= tl.exp2(s)[:, None]
                apart = s[:, None] - r[None, :]
        if SHIFTED != "":
            shift = numbers(shift_ptr, first, head, shift_t, shift_h, in_seq, CHUNK)
            if SHIFTED == "rows":
                scores += shift[:, None]
                out += shift[:, None] * vector[None, :]
            else:
                scores += shift[None, :]
                out += vector[None, :]
        if HAS_DECAY:
            scores *= tl.exp2(tl.where(seen, apart, float("-inf")))
        else:
            scores = tl.where(seen, scores, 0.0)
        if HAS_WEIGHT:
            scores *= numbers(weight_ptr, first, head, weight_t, weight_h, in_seq, CHUNK)[None, :]
        if SCALED == "keys":
            scores *= factor
        if NORMALISE:
            total = tl.sum(query.to(tl.float32) * vector[None, :], 1) + tl.sum(scores, 1)
            vector += tl.sum(key.to(tl.float32), 0)
        if HAS_SKIP:
            scores = tl.where(step[:, None] == step[None, :], scores + skip, scores)  # it rides on the diagonal
        out = mixed(scores, value, out, OPERAND)

        if NORMALISE:
            row = factor / (factor * total + eps)
            row_at = first * row_t + head * row_h + step * row_t
            tl.store(row_ptr + row_at, row, mask=step < tl.where(column == 0, left, 0))
            out *= row[:, None]
        if HAS_ROW:
            out *= numbers(row_ptr, first, head, row_t, row_h, in_seq, CHUNK)[:, None]
        if SCALED == "rows":
            out *= factor
        if P % BLOCK_P == 0:
            in_out = in_seq[:, None]
        else:
            in_out = in_seq[:, None] & (p < P)[None, :]
        out_at = (first * H + head) * P + (step[:, None] * (H * P) + p[None, :])
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=in_out)

        moved = value  # what the keys bring into the state
        if HAS_DECAY:
            if REVERSE:
                moved = value * tl.exp2(s)[:, None]
            else:
                moved = value * tl.exp2(whole - r)[:, None]
            state *= tl.exp2(whole)
        if HAS_WEIGHT:
            moved = moved * numbers(weight_ptr, first, head, weight_t, weight_h, in_seq, CHUNK)[:, None]
        if SCALED == "keys":
            moved = moved.to(tl.float32) * factor
        if SHIFTED == "rows":
            vector += tl.sum(moved.to(tl.float32), 0)
        elif SHIFTED == "keys":
            vector += tl.sum(moved * shift[:, None], 0)
        state = mixed(tl.trans(key), moved, state, OPERAND)
    if STORE_END:
        end_at = (sequence * H + head) * end_h + n[:, None] * end_n + p[None, :] * end_p
        tl.store(end_ptr + end_at, state, mask=in_state)
        if NORMALISE or SHIFTED == "keys":
            vector_at = (sequence * H + head) * end_vector_h + x * end_vector_x
            wanted = in_vector
            if NORMALISE:
                wanted = in_vector & (n < tl.where(column == 0, N, 0))
            tl.store(end_vector_ptr + vector_at, vector, mask=wanted)


@launched(do_not_specialize=["BT"])
def row_products_kernel(
    x_ptr, y_ptr, out_ptr,  # [BT,H,P] by strides, [BT,H,P] by strides, [H,BT] float32
    BT, x_t, x_h, y_t, y_h,
    P: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out = -<x, y> per token and head; one program owns ROWS tokens of one head."""
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * ROWS
    step = tl.arange(0, ROWS)
    live = step < BT - first
    p = tl.arange(0, BLOCK_P)
    x = chunk_tile(x_ptr + head * x_h, first, x_t, p, live, P, ROWS, BLOCK_P)
    y = chunk_tile(y_ptr + head * y_h, first, y_t, p, live, P, ROWS, BLOCK_P)
    tl.store(out_ptr + head * BT + first + step, -tl.sum(x.to(tl.float32) * y.to(tl.float32), 1), mask=live)

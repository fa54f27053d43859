"""Launches the FAVOR+ kernels with block sizes from a plain rule; nothing is searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.ops.favor_attention.kernels.causal_gradient import causal_gradient_kernel
from zoo.ops.favor_attention.kernels.causal_read import causal_read_kernel
from zoo.ops.favor_attention.kernels.rows import combine_kernel, delta_kernel
from zoo.ops.favor_attention.kernels.walk_launch import gradient_walk, read_walk, serves, walk_of
from zoo.ops.favor_attention.kernels.walk_lean_launch import lean_backward, lean_forward, lean_walk, serves_lean
from zoo.ops.favor_attention.kernels.whole import whole_gradient_kernel, whole_read_kernel, whole_sum_kernel
from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.semiseparable.kernels.launch import OPERANDS, contiguous, flat, strides

ROWS = 32  # rows of a program of the row kernels


@dataclass(frozen=True)
class Call:
    """What all launches of one call share.

    hi, lo: [M,N] in the operand dtype, their sum is N^-1/4 times the projection (hi alone in float32).
    spans: starts and ends of the queries' and of the keys' sequences, int64 [S] each.
    slices: programs that share a head's features. constants: constexpr arguments of every kernel.
    """

    hi: Tensor
    lo: Tensor
    spans: tuple[Tensor, Tensor, Tensor, Tensor]
    packed: bool
    heads: int
    slices: int
    half_scale: float
    feature_eps: float
    constants: dict[str, Any]

    @property
    def sequences(self) -> int:
        return self.spans[0].shape[0]

    @property
    def chunk(self) -> int:
        return int(self.constants["CHUNK"])


def call_of(
    q: Tensor, v: Tensor, projection: Tensor, spans: tuple[Tensor, ...], packed: bool, relu: bool, causal: bool,
    feature_eps: float,
) -> Call:  # fmt: skip
    """What the launches of one call share."""
    count, width = projection.shape
    heads, channels = q.shape[2], v.shape[3]
    scaled = projection.float() * width**-0.25
    hi = scaled.to(v.dtype)
    lo = (scaled - hi.float()).to(v.dtype)
    blocks = blocks_for(count, width, channels, v.dtype, causal)
    constants = blocks | {
        "H": heads, "M": count, "N": width, "P": channels, "RELU": relu, "SPLIT": v.dtype != torch.float32,
        "OPERAND": OPERANDS[v.dtype],
    }  # fmt: skip
    return Call(
        hi.contiguous(), lo.contiguous(), (spans[0], spans[1], spans[2], spans[3]), packed, heads,
        cdiv(count, blocks["BLOCK_M"]), 0.5 * width**-0.5, feature_eps, constants,
    )  # fmt: skip


def blocks_for(count: int, width: int, channels: int, dtype: torch.dtype, causal: bool) -> dict[str, int]:
    """Block sizes by widths and dtype.

    A causal program holds the state [BLOCK_M, BLOCK_P] and the features of a chunk's readers and writers in registers:
    chunks of 32 tokens do not spill at 64 channels (checked for sm_90). IEEE float32 products (and TF32, for float16)
    hold their operands in registers as well: fewer features, more warps.
    """
    block_n, block_p = (max(16, next_power_of_2(size)) for size in (width, channels))
    widest = max(block_n, block_p)
    narrow = dtype != torch.bfloat16 or widest > 128
    block_m = min(32 if narrow else 64, max(16, next_power_of_2(count)))
    return {
        "CHUNK": 32 if narrow or causal else 64, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_P": block_p,
        "num_warps": 8 if widest > (32 if dtype == torch.float32 else 64) else 4, "num_stages": 2,
    }  # fmt: skip


def empty_like_state(call: Call, device: torch.device) -> Tensor:
    shape = (call.sequences, call.heads, call.constants["M"], call.constants["P"] + 2)
    return torch.empty(shape, dtype=torch.float32, device=device)


def forward(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, initial_state: Tensor | None,
    spans: tuple[Tensor, ...], packed: bool, relu: bool, causal: bool, feature_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y [B,T,H,P], the logarithm of its sums of weights [B,T,H] float32, and the final state [S,H,M,P+2] float32."""
    call = call_of(q, v, projection, spans, packed, relu, causal, feature_eps)
    q, k, v = flat(q), flat(k), flat(v)
    y = torch.empty((*q.shape[:3], v.shape[3]), dtype=v.dtype, device=v.device)
    log_total = torch.empty(q.shape[:3], dtype=torch.float32, device=v.device)
    state = empty_like_state(call, v.device)
    with on_device(v):
        if causal and serves_lean(q.shape[3], v.shape[3], projection.shape[0], v.dtype, relu):
            lean = lean_walk(k, projection, spans[0], spans[1], call.heads)
            lean_forward(lean, q, k, v, contiguous(initial_state), state, y, log_total)
        elif causal and serves(q.shape[3], v.shape[3], projection.shape[0], v.dtype):
            walk = walk_of(k, projection, spans[0], spans[1], call.heads, v.shape[3], relu, feature_eps)
            read_walk(walk, q, k, v, None, contiguous(initial_state), state, y, log_total)
        elif causal:
            causal_read(call, q, k, v, None, contiguous(initial_state), state, y, log_total)
        else:
            whole_sum(call, k, v, None, None, None, state)
            whole_read(call, q, state, y, log_total, reverse=False)
    return y, log_total, state


def backward(
    dy: Tensor, dlog: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, projection: Tensor,
    initial_state: Tensor | None, y: Tensor, log_total: Tensor, final_state: Tensor,
    spans: tuple[Tensor, ...], packed: bool, relu: bool, causal: bool, feature_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and the initial state (empty if there is none).

    Features and states are computed anew. Slices of features add to their gradients in scratch memory, in a fixed
    order, so that gradients are the same in every run.

    The mean of <dy, v_j> - delta under a query's weights is -dlog, so that an error of delta that the tiles of the
    gradient do not share is left over where a few keys have all the weight: in float32 what is left over is measured
    first, in a pass of its own, and goes to delta.
    """
    call = call_of(q, v, projection, spans, packed, relu, causal, feature_eps)
    dy, q, k, v = dy.to(v.dtype).contiguous(), flat(q), flat(k), flat(v)
    log_total, initial = log_total.contiguous(), contiguous(initial_state)
    delta = torch.empty_like(log_total)
    first = torch.cat([dfinal[..., :-2], -dfinal[..., -2:-1], -final_state[..., -1:]], -1).contiguous()
    last = empty_like_state(call, v.device)
    balanced = v.dtype == torch.float32 and not relu  # the slopes of ReLU features are no weights
    rows, channels, block_p = delta.numel(), v.shape[3], call.constants["BLOCK_P"]
    with on_device(v):
        if causal and serves_lean(q.shape[3], channels, call.constants["M"], v.dtype, relu):
            lean = lean_walk(k, projection, spans[0], spans[1], call.heads)
            parts = lean_backward(
                lean, dy, y.contiguous(), dlog.contiguous(), log_total, q, k, v, initial, first, last
            )  # fmt: skip
            return gradients(parts, q, k, v, initial, last, relu)
        delta_kernel[(cdiv(rows, ROWS),)](
            dy, y.contiguous(), dlog.contiguous(), delta, rows, P=channels, ROWS=ROWS, BLOCK_P=block_p
        )
        if causal and serves(q.shape[3], channels, call.constants["M"], v.dtype):
            walk = walk_of(k, projection, spans[0], spans[1], call.heads, channels, relu, feature_eps)
            dq = gradient_walk(walk, q, k, dy, v, log_total, delta, initial, last, reverse=False)
            dk = gradient_walk(walk, k, q, v, dy, log_total, delta, first, last, reverse=True)
            dv = read_walk(walk, k, q, dy, log_total, first, last, None, None)
        elif causal:
            if balanced:
                left = causal_gradient(call, q, k, dy, v, log_total, delta, initial, last, reverse=False, balance=True)
                delta += left - dlog
            dq = causal_gradient(call, q, k, dy, v, log_total, delta, initial, last, reverse=False)
            dk = causal_gradient(call, k, q, v, dy, log_total, delta, first, last, reverse=True)
            dv = causal_read(call, k, q, dy, log_total, first, last, None, None)
        else:
            if balanced:
                final = final_state.contiguous()
                delta += whole_gradient(call, q, dy, final, log_total, delta, reverse=False, balance=True) - dlog
            dq = whole_gradient(call, q, dy, final_state.contiguous(), log_total, delta, reverse=False)
            whole_sum(call, q, dy, log_total, delta, first, last)
            dk = whole_gradient(call, k, v, last, log_total, delta, reverse=True)
            dv = torch.empty((*v.shape[:2], call.heads, channels), dtype=v.dtype, device=v.device)
            whole_read(call, k, last, dv, log_total, reverse=True)
    return gradients((dq, dk, dv), q, k, v, initial, last, relu)


def gradients(
    parts: tuple[Tensor, Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, last: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Those of q, k, v and the initial state, of `parts` for every query head and the sums over queries `last`."""
    dq, dk, dv = parts
    dinitial = last.new_empty(0)
    if initial is not None:
        scale = last.new_ones(()) if relu else (initial[..., -1:] + last[..., -1:]).exp()
        dinitial = torch.cat([last[..., :-2] * scale, -last[..., -2:-1] * scale, torch.zeros_like(last[..., :1])], -1)
    return dq.to(q.dtype), by_group(dk, k), by_group(dv, v), dinitial


def by_group(part: Tensor, like: Tensor) -> Tensor:
    """[B,T,H,X] summed over the query heads of each group, in the shape and dtype of `like` [B,T,G,X]."""
    if part.shape[2] != like.shape[2]:
        part = part.unflatten(2, (like.shape[2], -1)).sum(3, dtype=torch.float32)
    return part.to(like.dtype)


def scratch_dtype(call: Call, operand: torch.dtype) -> torch.dtype:
    """Slices of gradients: bfloat16 where the result is, float32 otherwise."""
    return torch.bfloat16 if operand == torch.bfloat16 else torch.float32


def causal_read(
    call: Call, reader: Tensor, writer: Tensor, payload: Tensor, log_total: Tensor | None,
    first: Tensor | None, last: Tensor, y: Tensor | None, y_log: Tensor | None,
) -> Tensor:  # fmt: skip
    """Outputs (into y and y_log), or the gradients of v [B,T,G,P] if `y` is None: then in reverse."""
    reverse = y is None
    batch, tokens = reader.shape[:2]
    shape = (call.slices, batch, tokens, call.heads, payload.shape[3])
    one = call.slices == 1
    dtype = scratch_dtype(call, payload.dtype) if reverse else payload.dtype
    out = y if y is not None and one else torch.empty(shape, dtype=dtype, device=reader.device)
    logs = y_log if y_log is not None and one else torch.empty(shape[:4], dtype=torch.float32, device=reader.device)
    assert out is not None
    causal_read_kernel[(call.sequences * call.heads, call.slices)](
        reader, writer, payload, call.hi, call.lo, log_total, first, last, call.spans[0], call.spans[1], out, logs,
        batch * tokens, call.half_scale, call.feature_eps, *strides(reader, writer, payload),
        J_READER=call.heads // reader.shape[2], J_WRITER=call.heads // writer.shape[2],
        J_PAYLOAD=call.heads // payload.shape[2],
        REVERSE=reverse, HAS_FIRST=first is not None, EMPTY_LOG=float("inf") if one else float("-inf"),
        **call.constants,
    )  # fmt: skip
    if reverse:
        return by_group(out.sum(0, dtype=torch.float32), reader.new_empty((batch, tokens, reader.shape[2], 0)))
    if not one:
        assert y is not None
        rows = y.numel() // y.shape[3]
        combine_kernel[(cdiv(rows, ROWS),)](
            out, logs, y, y_log, rows, call.slices,
            P=y.shape[3], ROWS=ROWS, BLOCK_P=call.constants["BLOCK_P"],
        )  # fmt: skip
    return y  # type: ignore[return-value]  # not None: not reverse


def causal_gradient(
    call: Call, reader: Tensor, writer: Tensor, beside: Tensor, payload: Tensor, log_total: Tensor, delta: Tensor,
    first: Tensor | None, last: Tensor, *, reverse: bool, balance: bool = False,
) -> Tensor:  # fmt: skip
    """Gradient of the reader for every query head, [B,T,H,N]; in reverse the last state is stored.

    balance: the sums of <dy, v_j> - delta under the queries' weights instead, [B,T,H].
    """
    batch, tokens, _, width = reader.shape
    shape = (call.slices, batch, tokens, call.heads, *([] if balance else [width]))
    grad = torch.empty(shape, dtype=scratch_dtype(call, reader.dtype), device=reader.device)
    causal_gradient_kernel[(call.sequences * call.heads, call.slices)](
        reader, writer, beside, payload, call.hi, call.lo, log_total, delta, first, last,
        call.spans[0], call.spans[1], grad, batch * tokens, call.half_scale, call.feature_eps,
        *strides(reader, writer, beside, payload),
        J_READER=call.heads // reader.shape[2], J_WRITER=call.heads // writer.shape[2],
        REVERSE=reverse, HAS_FIRST=first is not None, BALANCE=balance, **call.constants,
    )  # fmt: skip
    return grad.sum(0, dtype=torch.float32)


def whole_sum(
    call: Call, writer: Tensor, payload: Tensor, log_total: Tensor | None, delta: Tensor | None,
    first: Tensor | None, last: Tensor,
) -> None:  # fmt: skip
    """Sums over the keys into `last`; over the queries if `first` is given: in reverse."""
    spans = call.spans[2:] if first is None else call.spans[:2]
    whole_sum_kernel[(call.sequences * call.heads, call.slices)](
        writer, payload, call.hi, call.lo, log_total, delta, first, last, *spans, call.half_scale, call.feature_eps,
        *strides(writer, payload), J_WRITER=call.heads // writer.shape[2], REVERSE=first is not None, **call.constants,
    )  # fmt: skip


def blocks_of(call: Call, readers: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence and first token of every block of readers, int64; a block past its sequence's end has nothing to do."""
    batch, tokens = readers.shape[:2]
    if call.packed:
        slot = torch.arange(tokens // call.chunk + call.sequences, device=starts.device)
        first_slot = starts // call.chunk + torch.arange(call.sequences, device=starts.device)
        owner = torch.searchsorted(first_slot, slot, right=True) - 1
        local = slot - first_slot[owner]
    else:
        each = cdiv(tokens, call.chunk)
        slot = torch.arange(batch * each, device=starts.device)
        owner, local = slot // each, slot % each
    return owner, starts[owner] + local * call.chunk


def whole_read(call: Call, reader: Tensor, sums: Tensor, out: Tensor, log_total: Tensor, *, reverse: bool) -> None:
    """Outputs and their logarithms, or in reverse the gradients of v for every query head, into `out` [B,T,H,P]."""
    starts, ends = call.spans[2:] if reverse else call.spans[:2]
    owner, origin = blocks_of(call, reader, starts)
    whole_read_kernel[(owner.numel() * call.heads,)](
        reader, call.hi, call.lo, sums, owner, origin, ends, out, log_total, call.half_scale, call.feature_eps,
        *strides(reader), J_READER=call.heads // reader.shape[2], REVERSE=reverse, **call.constants,
    )  # fmt: skip


def whole_gradient(
    call: Call, reader: Tensor, beside: Tensor, sums: Tensor, log_total: Tensor, delta: Tensor, *, reverse: bool,
    balance: bool = False,
) -> Tensor:  # fmt: skip
    """Gradient of the reader for every query head, [B,T,H,N]; balance: as in `causal_gradient`."""
    starts, ends = call.spans[2:] if reverse else call.spans[:2]
    owner, origin = blocks_of(call, reader, starts)
    shape = (*reader.shape[:2], call.heads, *([] if balance else [reader.shape[3]]))
    grad = torch.empty(shape, dtype=scratch_dtype(call, reader.dtype), device=reader.device)
    whole_gradient_kernel[(owner.numel() * call.heads,)](
        reader, beside, call.hi, call.lo, sums, log_total, delta, owner, origin, ends, grad, call.half_scale,
        *strides(reader, beside), J_READER=call.heads // reader.shape[2],
        REVERSE=reverse, BALANCE=balance, **call.constants,
    )  # fmt: skip
    return grad

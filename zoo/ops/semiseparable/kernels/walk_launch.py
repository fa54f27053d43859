"""Launches the walk kernel: sizes, strides and the one table of its blocks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import Constants
from zoo.ops.kernels.launcher import start as start_kernel
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.semiseparable.kernels.launch import OPERANDS, contiguous, flat, strides
from zoo.ops.semiseparable.kernels.walk import row_products_kernel, walk_kernel


class Blocks(NamedTuple):
    chunk: int  # tokens of a chunk
    channels: int  # most columns of the state that one program holds
    warps: int
    stages: int


# By the widest key (rows of the state). Not here, because Triton 3.6 miscompiles it: chunk 64, 32 channels, 1 stage.
TABLE = {
    torch.bfloat16: {128: Blocks(64, 64, 4, 2), 256: Blocks(64, 32, 4, 2)},
    torch.float16: {128: Blocks(64, 32, 4, 2), 256: Blocks(32, 32, 4, 2)},
}


@lru_cache
def blocks_for(dtype: torch.dtype, width: int) -> Blocks:
    """Blocks of a walk over keys of `width` channels."""
    return next(blocks for widest, blocks in TABLE[dtype].items() if width <= widest)


class State(NamedTuple):
    """States [S,H,N,P] in float32, any view whose first axis takes H steps of the second; a vector [S,H,X] beside."""

    matrix: Tensor | None
    vector: Tensor | None = None

    def steps(self) -> tuple[int, ...]:
        found = (0, 0, 0) if self.matrix is None else self.matrix.stride()[1:]
        return found + ((0, 0) if self.vector is None else self.vector.stride()[1:])


NO_STATE = State(None)


class Tokens(NamedTuple):
    """float32 numbers per token and head, [BT,H] by strides."""

    values: Tensor

    @staticmethod
    def empty(tokens: int, heads: int, device: torch.device) -> Tokens:
        return Tokens(torch.empty_strided((tokens, heads), (1, tokens), dtype=torch.float32, device=device))


class Decays(NamedTuple):
    """Sums of log2 decays inside each chunk, float32 [H,slots,chunk].

    s: up to and with a token; beyond a sequence it stays. r: s - log2 of the time step.
    first: int [S] or longer, the slots where packed sequences begin; without packing rows follow one another.
    """

    s: Tensor
    r: Tensor
    first: Tensor | None = None


def walk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool = False,
    decays: Decays | None = None,
    skip: Tensor | None = None,
    factor: float = 1.0,
    scaled: str = "",
    eps: float = 0.0,
    normalise: bool = False,
    rows: Tokens | None = None,
    weights: Tokens | None = None,
    shift: Tokens | None = None,
    shifted: str = "",
    start: State = NO_STATE,
    end: State = NO_STATE,
    blocks: Blocks | None = None,
) -> None:
    """Fill `out` [B,T,H,P], contiguous, and `end`; see `walk_kernel` for the formula.

    query [B,T,HQ,N], key [B,T,HK,N], value [B,T,HV,P]: `flat`, of one half precision dtype; H is a multiple of each.
    rows: with `normalise`, where the row factors go; else row factors to apply.
    """
    B, T, H, P = out.shape
    blocks = blocks or blocks_for(query.dtype, query.shape[3])
    if decays is not None:
        assert decays.s.shape[2] == blocks.chunk, "sums of decays belong to chunks of the walk"
    S = B if cu_seqlens is None else cu_seqlens.numel() - 1
    factored = scaled if factor != 1.0 else ""
    constants = _constants(
        blocks, query.dtype, H, query.shape[2], key.shape[2], value.shape[2], query.shape[3], P,
        reverse, cu_seqlens is not None, decays is not None, skip is not None, factored, normalise,
        rows is not None and not normalise, weights is not None, shifted,
        start.matrix is not None, start.vector is not None, end.matrix is not None,
    )  # fmt: skip
    s, r, first, slots = (None, None, None, 0) if decays is None else (*decays, decays.s.shape[1])
    row, row_steps = _parts(rows)
    weight, weight_steps = _parts(weights)
    moved, moved_steps = _parts(shift)
    with on_device(query):
        start_kernel(
            walk_kernel, (S * H * cdiv(P, constants["BLOCK_P"]),), constants,
            query, key, value, s, r, first, skip, row, weight, moved,
            start.matrix, start.vector, cu_seqlens, out, end.matrix, end.vector, factor, eps, T, slots,
            *query.stride()[1:3], *key.stride()[1:3], *value.stride()[1:3], *row_steps, *weight_steps, *moved_steps,
            *start.steps(), *end.steps(),
        )  # fmt: skip


FLAGS = (
    "REVERSE", "PACKED", "HAS_DECAY", "HAS_SKIP", "SCALED", "NORMALISE", "HAS_ROW", "HAS_WEIGHT", "SHIFTED",
    "HAS_START", "HAS_START_VECTOR", "STORE_END",
)  # fmt: skip


@lru_cache(maxsize=256)
def _constants(
    blocks: Blocks, dtype: torch.dtype, H: int, HQ: int, HK: int, HV: int, N: int, P: int, *flags: bool | str
) -> Constants:
    """Constants and options of a launch. flags: values of FLAGS."""
    return Constants({
        "H": H, "JQ": H // HQ, "JK": H // HK, "JV": H // HV, "N": N, "P": P, **dict(zip(FLAGS, flags, strict=True)),
        "CHUNK": blocks.chunk, "BLOCK_N": max(16, next_power_of_2(N)),
        "BLOCK_P": min(blocks.channels, max(16, next_power_of_2(P))),
        "OPERAND": OPERANDS[dtype], "num_warps": blocks.warps, "num_stages": blocks.stages,
    })  # fmt: skip


def _parts(part: Tokens | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """The tensor and its steps."""
    return (None, (0, 0)) if part is None else (part.values, part.values.stride())


def parted(state: Tensor | None, normalise: bool) -> State:
    """State [S,H,N,P(+1)] as the walk takes it: the matrix, and the last column beside it if `normalise`."""
    if state is None:
        return NO_STATE
    return State(state[..., :-1], state[..., -1]) if normalise else State(state)


def turned(state: State) -> State:
    """The state of the walk whose keys are the values of the other."""
    return State(None if state.matrix is None else state.matrix.mT, state.vector)


def linear_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    normalise: bool,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B,T,H,P], final state [S,H,N,P(+1)] and, if `normalise`, the row factors [B T,H] (else empty)."""
    q, k, v, cu_seqlens, initial_state = flat(q), flat(k), flat(v), contiguous(cu_seqlens), contiguous(initial_state)
    B, T, H, N = q.shape
    P = v.shape[3]
    S = B if cu_seqlens is None else cu_seqlens.numel() - 1
    y = torch.empty((B, T, H, P), dtype=v.dtype, device=v.device)
    final = torch.empty((S, H, N, P + normalise), dtype=torch.float32, device=v.device)
    rows = Tokens.empty(B * T if normalise else 0, H, v.device)
    walk(
        q, k, v, y, cu_seqlens,
        factor=scale, scaled="" if normalise else "rows", eps=eps, normalise=normalise,
        rows=rows if normalise else None, start=parted(initial_state, normalise), end=parted(final, normalise),
    )  # fmt: skip
    return y, final, rows.values


def linear_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    rows: Tensor,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state (empty if absent): three walks with the roles exchanged.

    dfinal: None for zeros.

    dv_j = sum_{i>=j} <k_j, q_i> a_i dy_i; dq_i = a_i sum_{j<=i} (<dy_i, v_j> + b_i) k_j;
    dk_j = sum_{i>=j} (<v_j, dy_i> + b_i) a_i q_i; a the row factors and b_i = -<dy_i, y_i>, or a = scale and b = 0.
    """
    dy, q, k, v, cu_seqlens = flat(dy.to(v.dtype)), flat(q), flat(k), flat(v), contiguous(cu_seqlens)
    dfinal, initial_state = contiguous(dfinal), contiguous(initial_state)
    B, T, H, _ = q.shape
    G = v.shape[2]
    dinitial = torch.empty(0 if initial_state is None else initial_state.shape, dtype=torch.float32, device=v.device)
    shift = row_products(dy, y) if normalise else None
    factors = Tokens(rows) if normalise else None
    shifted = ("rows", "keys") if normalise else ("", "")
    late, first = parted(dfinal, normalise), parted(initial_state, normalise)
    begin = NO_STATE if initial_state is None else turned(parted(dinitial, normalise))

    def like(part: Tensor) -> Tensor:
        if part.shape[2] == H:
            return torch.empty_like(part, memory_format=torch.contiguous_format)
        # heads of a group are summed before rounding
        return torch.empty((B, T, H, part.shape[3]), dtype=torch.float32, device=v.device)

    dq, dk, dv = like(q), like(k), like(v)
    constant = 1.0 if normalise else scale
    keys: dict[str, Any] = {"reverse": True, "factor": constant, "scaled": "keys", "weights": factors}
    walk(k, q, dy, dv, cu_seqlens, start=State(late.matrix), **keys)
    walk(
        dy, v, k, dq, cu_seqlens, factor=constant, scaled="rows", rows=factors, shift=shift, shifted=shifted[0],
        start=turned(first),
    )  # fmt: skip
    walk(v, dy, q, dk, cu_seqlens, start=turned(late), end=begin, shift=shift, shifted=shifted[1], **keys)
    if G != H:
        dk, dv = (part.unflatten(2, (G, H // G)).sum(3).to(v.dtype) for part in (dk, dv))
    return dq, dk, dv, dinitial


def row_products(dy: Tensor, y: Tensor) -> Tokens:
    """-<dy, y> per token and head, of two `flat` tensors [B,T,H,P]."""
    B, T, H, P = y.shape
    made = Tokens.empty(B * T, H, y.device)
    with on_device(y):
        row_products_kernel[(cdiv(B * T, 32), H)](
            dy, y, made.values, B * T, *strides(dy, y), P=P, ROWS=32, BLOCK_P=max(16, next_power_of_2(P)),
            num_warps=4,
        )  # fmt: skip
    return made

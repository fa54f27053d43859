"""Launches the short convolution of many taps on tensor cores; block sizes come from a table. See banded.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.short_convolution.kernels.banded import CHUNK, banded_kernel
from zoo.ops.short_convolution.kernels.banded_taps import banded_taps_kernel
from zoo.ops.short_convolution.kernels.looped import final_state, initial_state_gradient

FEWEST, MOST = 9, 65  # taps; fewer are unrolled in registers, the tiles of more do not fit there
CHANNELS = 16  # of a program: a sector of memory
SPANS = (64, 1024)  # tokens of a span, at least and at most: those before it are read again
PROGRAMS = 132  # that run at the same time: one on each multiprocessor of a large GPU


class Size(NamedTuple):
    """Channels of a warp, spans of a program and stages of its loop."""

    held: int = 2
    rows: int = 16
    stages: int = 4


SIZES = {"forward": Size(), "tokens": Size(), "taps": Size(stages=3)}


class Spans(NamedTuple):
    """Spans of at most `span` tokens: their number, and if packed where each begins (see `spans_of` in banded.py)."""

    span: int
    number: int
    start: Tensor | None = None
    before: Tensor | None = None
    rest: Tensor | None = None
    owner: Tensor | None = None

    @property
    def tables(self) -> tuple[Tensor | None, ...]:
        return self.start, self.before, self.rest, self.owner


def banded_serves(x: Tensor, width: int) -> bool:
    """Whether these kernels take `width` taps of x [B,T,D]: in half precision, of channels in whole sectors."""
    return x.dtype in (torch.bfloat16, torch.float16) and x.shape[2] % CHANNELS == 0 and FEWEST <= width <= MOST


def span_of(sequences: int, tokens: int, channels: int) -> int:
    """Tokens of a span, a power of 2, so that programs are soon done: each needs a multiprocessor, and begins with
    tokens before its spans."""

    def rounds_of_tokens(span: int) -> int:
        blocks = cdiv(sequences * cdiv(tokens, span), SIZES["forward"].rows)
        return cdiv(blocks * (channels // CHANNELS), PROGRAMS) * (span + MOST)

    shortest, longest = SPANS
    return min((1 << bits for bits in range(shortest.bit_length() - 1, longest.bit_length())), key=rounds_of_tokens)


def spans_in(x: Tensor, cu_seqlens: Tensor | None) -> Spans:
    """Spans of x [B,T,D]. Shapes follow from sizes alone; slots without a token have rest 0."""
    batch, tokens, channels = x.shape
    span = span_of(batch, tokens, channels)
    if cu_seqlens is None:
        return Spans(span, batch * cdiv(tokens, span))
    ends = cu_seqlens.long()
    first = ends[:-1] // span + torch.arange(ends.numel() - 1, device=ends.device)
    slot = torch.arange(tokens // span + ends.numel() - 1, device=ends.device)
    owner = torch.searchsorted(first, slot, right=True) - 1
    start = ends[owner] + (slot - first[owner]) * span
    rest = (ends[owner + 1] - start).clamp_(min=0)
    return Spans(span, slot.numel(), start, (start - ends[owner]).int(), rest.int(), owner)


def evenly(x: Tensor) -> Tensor:
    """x [B,T,D] with tokens that begin at multiples of 16 numbers; copied if they do not."""
    return x if x.stride(2) == 1 and x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0 else x.contiguous()


def tokens_first(state: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[S,D,W-1] as [S,W-1,D] contiguous."""
    return None if state is None else state.transpose(1, 2).to(dtype).contiguous()


def layout_of(kernel: str, spans: Spans, channels: int, width: int) -> tuple[int, int, dict[str, Any]]:
    """Programs, how many of them share the spans of the same channels, and the constants of a kernel."""
    size = SIZES[kernel]
    groups = channels // CHANNELS
    blocks = cdiv(spans.number, size.rows)
    parts = cdiv(blocks, cdiv(blocks * groups, 4 * PROGRAMS))
    constants = {
        "W": width, "PACKED": spans.start is not None, "SHIFTS": (width + CHUNK.value - 2) // CHUNK.value + 1,
        "SPAN": spans.span, "WIDE": CHANNELS, "HELD": size.held, "ROWS": size.rows,
        "num_warps": CHANNELS // size.held, "num_stages": size.stages,
    }  # fmt: skip
    return parts * groups, parts, constants


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, edge: Tensor | None, spans: Spans, *, reverse: bool
) -> Tensor:
    """y [B,T,D] of x evenly laid out, weight [D,W] contiguous, edge [S,W-1,D]; or if reverse dx of dy."""
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    y = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    programs, _, constants = layout_of("tokens" if reverse else "forward", spans, channels, width)
    split = weight.dtype != x.dtype
    banded_kernel[(programs,)](
        x, weight, bias, edge, y, *spans.tables, spans.number, tokens, channels, 1, x.stride(0), x.stride(1),
        HAS_BIAS=bias is not None, HAS_EDGE=edge is not None, REVERSE=reverse, SPLIT=split,
        SCALED=split and x.dtype == torch.float16, BLOCK_W=next_power_of_2(width), **constants,
    )  # fmt: skip
    return y


def tap_gradient(dy: Tensor, x: Tensor, weight: Tensor, edge: Tensor | None, spans: Spans) -> Tensor:
    """Gradient of weight [D,W], in its dtype."""
    tokens, channels = x.shape[1:]
    width = weight.shape[1]
    programs, parts, constants = layout_of("taps", spans, channels, width)
    sums = torch.empty((parts, channels, width), dtype=torch.float32, device=x.device)
    banded_taps_kernel[(programs,)](
        dy, x, edge, sums, *spans.tables, spans.number, tokens, channels,
        dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), HAS_EDGE=edge is not None, **constants,
    )  # fmt: skip
    return (sums[0] if parts == 1 else sums.sum(0)).to(weight.dtype)


def banded_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the final state, as of the custom operator without activation."""
    x, weight = evenly(x), weight.contiguous()
    state = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    bias = None if bias is None else bias.contiguous()
    y = convolve(x, weight, bias, tokens_first(state, x.dtype), spans_in(x, cu_seqlens), reverse=False)
    return y, final_state(x, state, weight.shape[1], cu_seqlens)


def banded_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the initial state; [0] for one that did not come."""
    x, dy, weight = evenly(x), evenly(dy), weight.contiguous()
    spans = spans_in(x, cu_seqlens)
    dx = convolve(dy, weight, None, tokens_first(dfinal, x.dtype), spans, reverse=True)
    dweight = tap_gradient(dy, x, weight, tokens_first(initial_state, x.dtype), spans)
    dbias = x.new_empty(0) if bias is None else dy.sum((0, 1), dtype=torch.float32).to(bias.dtype)
    if initial_state is None:
        return dx, dweight, dbias, x.new_empty(0)
    return dx, dweight, dbias, initial_state_gradient(dy, dfinal, weight, initial_state, cu_seqlens)

"""LTI attention through FFTs: every product k_a v_b is a sequence of its own, convolved with the kernel of its head.

P^2 sequences per head: the form of the H3 paper, for long inputs with narrow heads. States pass from chunk to chunk as
in the chunked path; only what an initial state adds to the outputs is read from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype
from zoo.ops.long_convolution import long_convolution
from zoo.ops.lti.vandermonde import lti_kernel
from zoo.ops.lti_attention.chunked import (
    as_states,
    empty_result,
    entering_states,
    final_states,
    keep_empty,
    layout_of,
    pairs_of,
    read_out,
    read_states,
)
from zoo.ops.lti_attention.factors import chunk_factors


def lti_attention_fft(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    c: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `lti_attention`; spectra and sums in the accumulation dtype, y rounded once."""
    if v.numel() == 0:
        return empty_result(v, log_a, initial_state, cu_seqlens)
    inner = accumulation_dtype(v.dtype)
    wide_q, wide_k, wide_v = (part.to(inner) for part in (q, k, v))
    y = convolved(wide_q, wide_k, wide_v, lti_kernel(log_a, c, v.shape[1], dtype=inner), D, cu_seqlens)
    layout = layout_of(v, log_a.shape[1], cu_seqlens)
    factors = chunk_factors(log_a, c, None, layout.chunk, inner)
    q_RCHKP, k_RCHKP, v_RCHKP = (layout.split(part).movedim(3, 2) for part in (wide_q, wide_k, wide_v))
    pairs_RCHKQ = pairs_of(k_RCHKP, v_RCHKP)
    added = as_states(factors.write.flatten(2).mT @ pairs_RCHKQ, v.shape[3])
    if initial_state is not None:
        before = entering_states(torch.zeros_like(added), log_a, initial_state, layout)
        y = y + layout.join(read_states(q_RCHKP, before, factors.read).movedim(2, 3))
    entering = entering_states(added, log_a, initial_state, layout)
    final = final_states(pairs_RCHKQ, added, entering, log_a, layout, cu_seqlens)
    return y.to(v.dtype), keep_empty(final, initial_state, layout)


def convolved(q: Tensor, k: Tensor, v: Tensor, kernel: Tensor, D: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """q_t^T ((kernel + D) * k v^T)_t from an empty state, [B,T,H,P]; kernel [H,T]."""
    heads, width = v.shape[2:]
    if width == 1:
        y = long_convolution(
            k.flatten(2),
            kernel,
            D=D,
            pre_gate=v.flatten(2),
            post_gate=q.flatten(2),
            cu_seqlens=cu_seqlens,
            backend="fft",
        )
        return y.unsqueeze(-1)
    pairs = pairs_of(k, v).flatten(2)  # [B,T,H*P*P]
    each = width * width
    skip = None if D is None else D.repeat_interleave(each)
    summed = long_convolution(pairs, kernel.repeat_interleave(each, 0), D=skip, cu_seqlens=cu_seqlens, backend="fft")
    return read_out(q, summed.unflatten(2, (heads, each)))

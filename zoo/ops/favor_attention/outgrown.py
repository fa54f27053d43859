"""Rows of causal FAVOR+ attention whose chunk holds a key that outgrows the first one and all before by exp(LIMIT).

One scale does not serve all pairs of such a chunk: its last keys may outgrow its first by any factor. So there are
several: the running maxima in the middles of halves, quarters, ... of the chunk. A weight is the product of
exp(log_q_ir + top_r - highest_i) and exp(log_k_jr - top_r), neither above 1, with `top` between j and i and `highest_i`
the largest logit of row i. Pairs inside the smallest parts are formed one by one.

Ordinary inputs have no such rows. The operator looks for them and computes the chunks that have some, one after
another, so that what stands in one chunk changes no bit of another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.semiseparable.chunked import split_axis

LIMIT = 40.0  # most that a key's logarithm exceeds the scale of its chunk
PART = 4  # tokens of a smallest part


@torch.library.custom_op("zoo::favor_outgrown_rows", mutates_args=())
def outgrown_rows(
    log_q: Tensor, log_k: Tensor, values: Tensor, entering: Tensor, point: Tensor, outgrown: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of exp(log_q + log_k - highest) values over all keys up to each row, [R,C,H,K,P+1]; highest [R,C,H,K,1].

    log_q, log_k [R,C,H,K,M] (-inf: no key), values [R,C,H,K,P+1], entering [R,C,H,M,P+1]: the sums before each chunk,
    times exp(-point), [R,C,H,M]. outgrown: bool [R,C,H,K,1]. Chunks without such a row have zeros.
    No gradient goes through point and highest.
    """
    sums, highest = torch.zeros_like(values), torch.zeros_like(values[..., :1])
    for c in chunks_of(outgrown):
        chunk = Chunk.of(log_q[:, c], log_k[:, c], point[:, c])
        sums[:, c] = chunk.sums(values[:, c], entering[:, c])
        highest[:, c] = chunk.highest
    return sums, highest


@torch.library.custom_op("zoo::favor_outgrown_rows_backward", mutates_args=())
def outgrown_rows_backward(
    dsums: Tensor, log_q: Tensor, log_k: Tensor, values: Tensor, entering: Tensor, point: Tensor,
    outgrown: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of log_q, log_k, values and entering."""
    got = tuple(torch.zeros_like(part) for part in (log_q, log_k, values, entering))
    for c in chunks_of(outgrown):
        chunk = Chunk.of(log_q[:, c], log_k[:, c], point[:, c])
        for whole, part in zip(got, chunk.gradients(dsums[:, c], values[:, c], entering[:, c]), strict=True):
            whole[:, c] = part
    return got[0], got[1], got[2], got[3]


def chunks_of(outgrown: Tensor) -> list[int]:
    """Chunks that have such a row."""
    found: list[int] = outgrown.movedim(1, 0).flatten(1).any(1).nonzero().flatten().tolist()
    return found


@dataclass
class Chunk:
    """One chunk of every row and head: K tokens.

    log_q: less `highest`, [R,H,K',M] with K' = PART * 2^n places. log_k: [R,H,K',M], -inf in places without a key.
    running: maximum over all keys up to each one, those before the chunk included. highest: [R,H,K,1].
    from_past: exp(log_q + point), [R,H,K,M].
    """

    log_q: Tensor
    log_k: Tensor
    running: Tensor
    highest: Tensor
    from_past: Tensor

    @classmethod
    def of(cls, log_q: Tensor, log_k: Tensor, point: Tensor) -> Chunk:
        """log_q, log_k [R,H,K,M], point [R,H,M]."""
        top = point.unsqueeze(-2)
        running = torch.maximum(log_k.cummax(-2).values, top)
        highest = (log_q + running).amax(-1, keepdim=True)
        below = log_q - highest
        last = running[..., -1:, :].expand(*running.shape[:2], padded_length(log_q.shape[-2]) - log_q.shape[-2], -1)
        return cls(
            pad(below, 0.0), pad(log_k, -torch.inf), torch.cat([running, last], -2), highest, (below + top).exp()
        )

    def sums(self, values: Tensor, entering: Tensor) -> Tensor:
        """values [R,H,K,P+1], entering [R,H,M,P+1] -> [R,H,K,P+1]."""
        padded = pad(values, 0.0)
        total = padded.new_zeros(padded.shape)
        for size, rows, keys, late, early in self.levels():
            parts(total, size)[..., rows, :] += (late @ early.mT) @ parts(padded, size)[..., keys, :]
        weights = self.near().sum(-1)
        total += (weights @ parts(padded, PART)).flatten(-3, -2)
        return total[..., : values.shape[-2], :] + self.from_past @ entering

    def gradients(self, dsums: Tensor, values: Tensor, entering: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of log_q, log_k, values and entering, of dsums [R,H,K,P+1]."""
        tokens = values.shape[-2]
        padded, cotangent = pad(values, 0.0), pad(dsums, 0.0)
        dq, dk, dv = (part.new_zeros(part.shape) for part in (self.log_q, self.log_k, padded))
        for size, rows, keys, late, early in self.levels():
            dread, held = parts(cotangent, size)[..., rows, :], parts(padded, size)[..., keys, :]
            dscores = dread @ held.mT
            parts(dq, size)[..., rows, :] += late * (dscores @ early)
            parts(dk, size)[..., keys, :] += early * (dscores.mT @ late)
            parts(dv, size)[..., keys, :] += (late @ early.mT).mT @ dread
        weights, dread = self.near(), parts(cotangent, PART)
        felt = weights * (dread @ parts(padded, PART).mT).unsqueeze(-1)
        dq += felt.sum(-2).flatten(-3, -2)
        dk += felt.sum(-3).flatten(-3, -2)
        dv += (weights.sum(-1).mT @ dread).flatten(-3, -2)
        dq = dq[..., :tokens, :] + self.from_past * (dsums @ entering.mT)
        return dq, dk[..., :tokens, :], dv[..., :tokens, :], self.from_past.mT @ dsums

    def levels(self) -> Iterator[tuple[int, slice, slice, Tensor, Tensor]]:
        """Size of the parts, their later half, their earlier half, and the factors of the weights between the two."""
        half = PART
        while half < self.log_q.shape[-2]:
            size, rows, keys = 2 * half, slice(half, None), slice(None, half)
            middle = parts(self.running, size)[..., half - 1 : half, :]
            late = (parts(self.log_q, size)[..., rows, :] + middle).exp_()
            early = (parts(self.log_k, size)[..., keys, :] - middle).exp_()
            yield size, rows, keys, late, early
            half = size

    def near(self) -> Tensor:
        """Weights of the pairs inside the smallest parts for every feature, [R,H,K'/PART,PART,PART,M]."""
        later = torch.ones(PART, PART, dtype=torch.bool, device=self.log_q.device).triu(1).unsqueeze(-1)
        pairs = parts(self.log_q, PART).unsqueeze(-2) + parts(self.log_k, PART).unsqueeze(-3)
        return pairs.masked_fill_(later, -torch.inf).exp_()


def padded_length(tokens: int) -> int:
    """The least PART * 2^n that holds all tokens."""
    length = PART
    while length < tokens:
        length *= 2
    return length


def pad(part: Tensor, filling: float) -> Tensor:
    """[R,H,K,X] -> [R,H,K',X]."""
    return F.pad(part, (0, 0, 0, padded_length(part.shape[-2]) - part.shape[-2]), value=filling)


def parts(part: Tensor, size: int) -> Tensor:
    """[R,H,K',X] -> [R,H,K'/size,size,X], a view if `part` is contiguous."""
    return split_axis(part, -2, part.shape[-2] // size)


@outgrown_rows.register_fake
def _fake(log_q: Tensor, log_k: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values), torch.empty_like(values[..., :1])


@outgrown_rows_backward.register_fake
def _backward_fake(
    dsums: Tensor, log_q: Tensor, log_k: Tensor, values: Tensor, entering: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    got = [torch.empty_like(part) for part in (log_q, log_k, values, entering)]
    return got[0], got[1], got[2], got[3]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dsums: Tensor, dhighest: Tensor | None) -> tuple[Tensor | None, ...]:
    outgrown = ctx.saved_tensors[-1]
    real = type(outgrown) is Tensor  # tracers (torch 2.11's do not say that they compile) pass stand-ins without values
    if real and not torch.compiler.is_compiling() and not outgrown.any():
        return (None,) * 6
    return (*outgrown_rows_backward(dsums, *ctx.saved_tensors), None, None)


outgrown_rows.register_autograd(_differentiate, setup_context=_save)
refuse_higher_order(outgrown_rows, "favor_attention", has_gradient=True)
refuse_higher_order(outgrown_rows_backward, "favor_attention", has_gradient=False)


@flop_formula(torch.ops.zoo.favor_outgrown_rows, get_raw=True)
def _flops(log_q: Tensor, log_k: Tensor, values: Tensor, entering: Tensor, *args: Any, **kwargs: Any) -> int:
    return len(chunks_of(args[1])) * chunk_flops(log_q, values)


@flop_formula(torch.ops.zoo.favor_outgrown_rows_backward, get_raw=True)
def _backward_flops(dsums: Tensor, log_q: Tensor, log_k: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> int:
    return 3 * len(chunks_of(args[2])) * chunk_flops(log_q, values)


def chunk_flops(log_q: Tensor, values: Tensor) -> int:
    """Matrix-product FLOPs of one such chunk of log_q [R,C,H,K,M] and values [R,C,H,K,P+1]."""
    rows, _, heads, tokens, count = log_q.shape
    width, length, half = values.shape[-1], padded_length(tokens), PART
    products = 2 * length * PART * width + 2 * tokens * count * width
    while half < length:
        products += length * half * (count + width)
        half *= 2
    return rows * heads * products

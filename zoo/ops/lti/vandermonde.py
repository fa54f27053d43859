"""Kernels of diagonal systems, K_l = 2 Re sum_n c_n e^{l log_a_n}, and the moments that transpose them.

Both are products with a Vandermonde matrix of powers, taken in two levels: l = b q + r, e^{l log_a} = hi[q] lo[r], with
hi and lo made in float64 and rounded once. That is one matrix product per channel, it reads 2 sqrt(length) powers of a
mode instead of `length`, and a slow mode of many turns keeps its phase (a float32 phase would lose four digits).

The gradient of a kernel is a moment and the gradient of a moment is a kernel, so both differentiate any number of
times while nothing but log_a and the weights is kept for it.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sequence_mixer.errors import DtypeError, ShapeError
from sequence_mixer.shapes import accumulation_dtype, expect_floating, expect_same_device, expect_shape
from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.dispatch import without_autocast
from zoo.ops.lti.modes import powers, times

__all__ = ["lti_kernel", "lti_moments"]

TABLE_ELEMENTS = 2**22  # float64 powers of one kind held at a time


def lti_kernel(log_a: Tensor, c: Tensor, length: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """K_l = 2 Re sum_n c_n e^{l log_a_n} for l = 0 .. length - 1: what `lti_scan` convolves with.

    log_a: [D,M,2], (re, im) of the log of M = N/2 modes; real part <= 0 for a stable one.
    c: [D,M,2], their weights, or [S,D,M,2] for S kernels of the same modes. The dtypes may differ: powers are taken in
        float64, so float64 values of log_a keep the phases of slow modes.
    length: number of lags, >= 0.
    dtype: of the products and the result, float32 or float64; the accumulation dtype of c if None.
    Returns [D,length] or [S,D,length]; differentiable in log_a and c any number of times.
    Accuracy in float32: about 3e-7 relative RMS against float64 at any length. Memory: the result, and a few tables of
    at most 2^22 numbers. Raises ShapeError, DtypeError, DeviceError.
    Source: Gu et al. 2022 (S4D, arXiv 2206.11893), the Vandermonde product; the two levels are ours.
    """
    wanted, inner, batched = _check(log_a, "c", c, "M 2", dtype)
    if length < 0:
        raise ShapeError(f"length is {length}, wanted a number of lags >= 0")
    kernel: Tensor = torch.ops.zoo.lti_kernel(log_a, c if batched else c.unsqueeze(0), length, inner)
    kernel = kernel if batched else kernel.squeeze(0)  # a select would copy its gradient
    return kernel if wanted == inner else kernel.to(wanted)


def lti_moments(log_a: Tensor, weights: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """sum_l weights_l e^{l log_a_n} as real pairs: the transpose of `lti_kernel`.

    log_a: [D,M,2]. weights: [D,length] or [S,D,length], real. dtype: as in `lti_kernel`.
    Returns [D,M,2] or [S,D,M,2]; differentiable in log_a and weights any number of times.
    With the tokens of a sequence in reverse order as weights, this is the state after the last one.
    """
    wanted, inner, batched = _check(log_a, "weights", weights, "L", dtype)
    moments: Tensor = torch.ops.zoo.lti_moments(log_a, weights if batched else weights.unsqueeze(0), 1, inner)
    moments = moments.squeeze(0) if batched else moments.squeeze(0).squeeze(0)
    return moments if wanted == inner else moments.to(wanted)


def _check(
    log_a: Tensor, argument: str, weights: Tensor, layout: str, dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype, bool]:
    """The dtype of the result, that of the products, and whether the weights have a batch axis."""
    for name, tensor in (("log_a", log_a), (argument, weights)):
        expect_floating(name, tensor)
    sizes = expect_shape("log_a", log_a, "D M 2")
    batched = weights.dim() > 1 + len(layout.split())
    expect_shape(argument, weights, f"{'S ' if batched else ''}D {layout}", sizes)
    expect_same_device(log_a, **{argument: weights})
    wanted = accumulation_dtype(weights.dtype) if dtype is None else dtype
    if not wanted.is_floating_point:
        raise DtypeError(f"dtype is {wanted}, wanted a floating one")
    return wanted, accumulation_dtype(wanted), batched


def _levels(length: int) -> tuple[int, int]:
    """Numbers of coarse and fine lags, q and r of l = b q + r with r < b; b is a power of two near the root."""
    fine = 1 << math.isqrt(max(length - 1, 0)).bit_length()
    return -(-length // fine), fine


def _tables(log_a: Tensor, length: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """hi [D,M,Q] and lo [D,M,R], pairs in float64: e^{(q R + r) log_a} = hi[q] lo[r]."""
    coarse, fine = _levels(length)
    lags = torch.arange(max(coarse, fine), device=log_a.device)
    return powers(log_a, lags[:coarse] * fine), powers(log_a, lags[:fine])


def _blocks(modes: int, sequences: int, length: int) -> int:
    """Channels served at a time, so that their tables stay small."""
    return max(1, TABLE_ELEMENTS // max(1, modes * sum(_levels(length)) * sequences))


def _spans(channels: int, step: int) -> list[slice]:
    return [slice(first, first + step) for first in range(0, channels, step)]


def _by_kernels(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether Triton kernels make the tables, in one pass instead of a dozen."""
    return tensor.is_cuda and dtype == torch.float32 and importlib.util.find_spec("triton") is not None


@torch.library.custom_op("zoo::lti_kernel", mutates_args=())
def _kernel(log_a: Tensor, c: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """log_a [D,M,2], c [S,D,M,2] -> [S,D,length]."""
    sequences, channels, modes = c.shape[:3]
    out = torch.empty(sequences, channels, length, dtype=dtype, device=c.device)
    if out.numel() == 0 or modes == 0:
        return out.zero_()
    step = _blocks(modes, sequences, length)
    with without_autocast(c):
        if _by_kernels(c, dtype):
            from zoo.ops.lti.kernels.levels import kernel_block

            log_a, c = log_a.contiguous(), c.contiguous()
            for span in _spans(channels, 2 * step):
                kernel_block(log_a[span], c[:, span], out[:, span], *_levels(length))
            return out
        for span in _spans(channels, step):
            hi, lo = _tables(log_a[span], length)
            weight = (2.0 * c[:, span].double()).unsqueeze(-1)  # [S,d,M,2,1]
            re, im = times((weight[..., 0, :], weight[..., 1, :]), hi)
            left = torch.cat([re, -im], 2).to(dtype)  # [S,d,2M,Q]
            right = torch.cat(lo, 1).to(dtype)  # [d,2M,R]
            out[:, span] = (left.mT @ right).flatten(2)[..., :length]
    return out


@_kernel.register_fake
def _(log_a: Tensor, c: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    return c.new_empty(c.shape[0], c.shape[1], length, dtype=dtype)


@torch.library.custom_op("zoo::lti_moments", mutates_args=())
def _moments(log_a: Tensor, weights: Tensor, kinds: int, dtype: torch.dtype) -> Tensor:
    """log_a [D,M,2], weights [S,D,L] -> [kinds,S,D,M,2]; kinds = 2: the moments of l weights_l besides."""
    sequences, channels, length = weights.shape
    modes = log_a.shape[1]
    out = torch.empty(kinds, sequences, channels, modes, 2, dtype=dtype, device=weights.device)
    if out.numel() == 0 or length == 0:
        return out.zero_()
    coarse, fine = _levels(length)
    step = _blocks(modes, sequences, length)
    with without_autocast(weights):
        if _by_kernels(weights, dtype):
            from zoo.ops.lti.kernels.levels import moment_block

            log_a, wide = log_a.contiguous(), weights if weights.stride(2) == 1 else weights.contiguous()
            for span in _spans(channels, 2 * step):
                moment_block(log_a[span], wide[:, span], out[:, :, span], coarse, fine)
            return out
        wide = weights.to(dtype)
        if kinds == 2:
            wide = torch.stack([wide, wide * torch.arange(length, dtype=dtype, device=wide.device)])
        for span in _spans(channels, max(1, step // kinds)):
            hi, lo = _tables(log_a[span], length)
            tiles = F.pad(wide[..., span, :], (0, coarse * fine - length)).unflatten(-1, (coarse, fine))
            inner = (tiles @ torch.cat(lo, 1).to(dtype).mT).mT  # [kinds,S,d,2M,Q], or without kinds
            re, im = times((inner[..., :modes, :], inner[..., modes:, :]), (hi[0].to(dtype), hi[1].to(dtype)))
            out[:, :, span] = torch.stack([re.sum(-1), im.sum(-1)], -1)
    return out


@_moments.register_fake
def _(log_a: Tensor, weights: Tensor, kinds: int, dtype: torch.dtype) -> Tensor:
    return weights.new_empty(kinds, weights.shape[0], weights.shape[1], log_a.shape[1], 2, dtype=dtype)


def _save_kernel(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    log_a, c, ctx.length, ctx.dtype = inputs
    ctx.save_for_backward(log_a, c)


def _differentiate_kernel(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    log_a, c = ctx.saved_tensors
    dlog_a = dc = None
    plain, sloped = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
    if not (plain or sloped):
        return None, None, None, None
    moments = torch.ops.zoo.lti_moments(log_a, grad, 2 if sloped else 1, ctx.dtype)
    twice = torch.arange(2.0, -3.0, -4.0, device=grad.device, dtype=moments.dtype)  # 2 re, -2 im
    if plain:
        dc = (moments[0] * twice).to(c.dtype)
    if sloped:
        (a, b), (re, im) = c.unbind(-1), moments[1].unbind(-1)
        turned = torch.stack([torch.addcmul(a * re, b, im, value=-1.0), torch.addcmul(a * im, b, re)], -1)
        dlog_a = (turned * twice).sum(0).to(log_a.dtype)
    return dlog_a, dc, None, None


def _save_moments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    log_a, weights, ctx.kinds, ctx.dtype = inputs
    ctx.save_for_backward(log_a, weights)


def _differentiate_moments(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of sum_l l^j weights_l e^{l log_a}, j < kinds: kernels for the weights, moments one power of l on for log_a."""
    log_a, weights = ctx.saved_tensors
    length = weights.shape[-1]
    dlog_a = dweights = None
    lags = torch.arange(length, device=grad.device, dtype=ctx.dtype)
    if ctx.needs_input_grad[1]:
        seen = grad * torch.tensor([0.5, -0.5], device=grad.device, dtype=grad.dtype)
        parts = [torch.ops.zoo.lti_kernel(log_a, part, length, ctx.dtype) for part in seen]
        dweights = (parts[0] if ctx.kinds == 1 else torch.addcmul(parts[0], parts[1], lags)).to(weights.dtype)
    if ctx.needs_input_grad[0]:
        moments = torch.ops.zoo.lti_moments(log_a, weights.to(ctx.dtype) * lags, ctx.kinds, ctx.dtype)
        (re, im), (m_re, m_im) = grad.unbind(-1), moments.unbind(-1)
        dlog_a = torch.stack([re * m_re + im * m_im, im * m_re - re * m_im], -1).sum((0, 1)).to(log_a.dtype)
    return dlog_a, dweights, None, None


_kernel.register_autograd(_differentiate_kernel, setup_context=_save_kernel)
_moments.register_autograd(_differentiate_moments, setup_context=_save_moments)
refuse_higher_order(_kernel, "lti_kernel", has_gradient=True)
refuse_higher_order(_moments, "lti_moments", has_gradient=True)


@flop_formula(torch.ops.zoo.lti_kernel, get_raw=True)
def _kernel_flops(log_a: Tensor, c: Tensor, length: int, *_: Any, **__: Any) -> int:
    return 4 * c.numel() // 2 * length


@flop_formula(torch.ops.zoo.lti_moments, get_raw=True)
def _moments_flops(log_a: Tensor, weights: Tensor, kinds: int, *_: Any, **__: Any) -> int:
    return kinds * 4 * weights.numel() * log_a.shape[1]

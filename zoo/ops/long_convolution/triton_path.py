"""The long convolution on a GPU: gates fused into the transposes around it, and between them a Toeplitz product on
tensor cores for kernels of up to LONGEST taps, transforms beyond. All as custom operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.custom import flop_formula, refuse_higher_order
from zoo.ops.long_convolution.call import Convolution
from zoo.ops.long_convolution.crossover import LONGEST
from zoo.ops.long_convolution.fft import circular_taps, fft_length

KERNEL_DTYPES = ("float32", "bfloat16", "float16")


def triton_refuses(*, taps: int, longest: int, empty: bool, packed: bool, auto: bool) -> str | None:
    """Why the kernels cannot serve a call, or, with backend="auto", why another path does it better; else None."""
    if empty:
        return "x is empty"
    if packed and auto and taps > longest:
        return (
            "multiplies packed rows by tiles, which is more work than transforms "
            f"beyond {longest} taps at this dtype; this call has {taps}"
        )
    return None


def convolve_triton(x: Tensor, call: Convolution) -> Tensor:
    """x [B,T,D] -> y [B,T,D]."""
    kernel, ahead = call.taps(x.shape[1], x.new_empty(0, dtype=torch.float32))
    taps = kernel.shape[1] + (0 if ahead is None else ahead.shape[1])
    by_transforms = taps > LONGEST[x.dtype] and call.cu_seqlens is None
    if not by_transforms and call.pre_gate is None and call.post_gate is None:
        both, reach = both_sides(with_skip(kernel, call.D), ahead, call.reverse_lag)
        plain: Tensor = long_convolution_plain(x, both, reach, call.cu_seqlens)[0]
        return plain
    if by_transforms:
        furthest = 0 if ahead is None else ahead.shape[1] - 1 + call.reverse_lag
        n = fft_length(x.shape[1] + max(kernel.shape[1] - 1, furthest))
        u_n = long_convolution_in(x, call.pre_gate, True, n)  # [D,B,n]
        y_t = long_convolution_circular(u_n, circular_taps(kernel, ahead, call.reverse_lag, n))[0]
        if call.D is not None:
            y_t = long_convolution_skip(y_t, u_n, call.D)
    else:
        both, reach = both_sides(with_skip(kernel, call.D), ahead, call.reverse_lag)
        u_t = long_convolution_in(x, call.pre_gate, False, row_length(x, call.cu_seqlens))  # [D,B,length]
        y_t = long_convolution_toeplitz(u_t, both, reach, call.cu_seqlens)
    y: Tensor = long_convolution_out(y_t, call.post_gate, x.dtype, x.shape[1])
    return y


def row_length(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Tokens of a row between the transposes: those of x, with zeros up to whole vectors where kernels read vectors."""
    tokens = x.shape[1]
    return tokens + -tokens % 16 if x.dtype == torch.bfloat16 and cu_seqlens is None else tokens


def with_skip(kernel: Tensor, D: Tensor | None) -> Tensor:
    """Taps [D,W] with the weight [D] of the token itself, if there is one, on the first."""
    return kernel if D is None else kernel + F.pad(D.to(kernel.dtype).unsqueeze(1), (0, kernel.shape[1] - 1))


def both_sides(kernel: Tensor, ahead: Tensor | None, reverse_lag: int) -> tuple[Tensor, int]:
    """Taps [D,W] from the furthest ahead to the furthest behind, and how many of them look ahead."""
    if ahead is None:
        return kernel, 0
    reach = ahead.shape[1] - 1 + reverse_lag
    behind = F.pad(kernel, (reach, 0))
    return behind + F.pad(ahead.flip(1), (0, behind.shape[1] - ahead.shape[1])), reach


@torch.library.custom_op("zoo::long_convolution_in", mutates_args=())
def long_convolution_in(x: Tensor, gate: Tensor | None, single: bool, length: int) -> Tensor:
    """x [B,T,D], times gate if there is one, then zeros: [D,B,length], in float32 if `single`, else as x."""
    from zoo.ops.long_convolution.kernels.gates import time_last

    return time_last(x, gate, torch.float32 if single else x.dtype, length)


@long_convolution_in.register_fake
def _(x: Tensor, gate: Tensor | None, single: bool, length: int) -> Tensor:
    return x.new_empty((x.shape[2], x.shape[0], length), dtype=torch.float32 if single else x.dtype)


@torch.library.custom_op("zoo::long_convolution_out", mutates_args=())
def long_convolution_out(y_t: Tensor, gate: Tensor | None, dtype: torch.dtype, tokens: int) -> Tensor:
    """The first tokens of y_t [D,B,length] as [B,tokens,D] in `dtype`, times gate if there is one."""
    from zoo.ops.long_convolution.kernels.gates import time_first

    return time_first(y_t[..., :tokens], gate, dtype)[0]


@long_convolution_out.register_fake
def _(y_t: Tensor, gate: Tensor | None, dtype: torch.dtype, tokens: int) -> Tensor:
    return y_t.new_empty((y_t.shape[1], tokens, y_t.shape[0]), dtype=dtype)


@torch.library.custom_op("zoo::long_convolution_circular", mutates_args=())
def long_convolution_circular(u_n: Tensor, taps_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Circular convolutions [D,B,n] of u_n [D,B,n] with taps_n [D,n], float32, and both transforms for the backward."""
    from zoo.ops.long_convolution.kernels import spectra

    return spectra.convolve(u_n.contiguous(), taps_n.contiguous())


@long_convolution_circular.register_fake
def _(u_n: Tensor, taps_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return u_n.new_empty(u_n.shape), u_n.new_empty(u_n.shape), taps_n.new_empty(taps_n.shape)


@torch.library.custom_op("zoo::long_convolution_circular_backward", mutates_args=())
def long_convolution_circular_backward(dy_n: Tensor, u_f: Tensor, taps_f: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u_n and taps_n, from the transforms of both."""
    from zoo.ops.long_convolution.kernels import spectra

    return spectra.gradients(dy_n.contiguous(), u_f, taps_f)


@long_convolution_circular_backward.register_fake
def _(dy_n: Tensor, u_f: Tensor, taps_f: Tensor) -> tuple[Tensor, Tensor]:
    return dy_n.new_empty(dy_n.shape), taps_f.new_empty(taps_f.shape)


@torch.library.custom_op("zoo::long_convolution_skip", mutates_args=())
def long_convolution_skip(y_t: Tensor, u_t: Tensor, D: Tensor) -> Tensor:
    """y_t + D u_t, contiguous. y_t, u_t: [D,B,n] float32. D: [D].

    A tap of the transforms would do, but its gradient would have their rounding: an error of the size of all taps.
    """
    return torch.addcmul(y_t, u_t, D.to(u_t.dtype)[:, None, None]).contiguous()


@long_convolution_skip.register_fake
def _(y_t: Tensor, u_t: Tensor, D: Tensor) -> Tensor:
    return u_t.new_empty(u_t.shape)


@torch.library.custom_op("zoo::long_convolution_gates_backward", mutates_args=())
def long_convolution_gates_backward(d_t: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The first T tokens of d_t [D,B,length] as [B,T,D] in the dtype of the gates, times each of the two [B,T,D]."""
    from zoo.ops.long_convolution.kernels.gates import time_first

    one, other = time_first(d_t[..., : first.shape[1]], first, first.dtype, second)
    return one, other


@long_convolution_gates_backward.register_fake
def _(d_t: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return first.new_empty(first.shape), second.new_empty(second.shape)


@torch.library.custom_op("zoo::long_convolution_toeplitz", mutates_args=())
def long_convolution_toeplitz(u_t: Tensor, taps: Tensor, ahead: int, cu_seqlens: Tensor | None) -> Tensor:
    """y_i = sum_w taps_w u_{i - w + ahead}: u_t [D,B,T], taps [D,W] float32 -> [D,B,T]."""
    from zoo.ops.long_convolution.kernels import launch

    return launch.toeplitz(u_t.contiguous(), taps.contiguous(), ahead, cu_seqlens, mirror=False)


@long_convolution_toeplitz.register_fake
def _(u_t: Tensor, taps: Tensor, ahead: int, cu_seqlens: Tensor | None) -> Tensor:
    return u_t.new_empty(u_t.shape)


@torch.library.custom_op("zoo::long_convolution_toeplitz_backward", mutates_args=())
def long_convolution_toeplitz_backward(
    dy_t: Tensor, u_t: Tensor, taps: Tensor, ahead: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of u_t and taps."""
    from zoo.ops.long_convolution.kernels import launch

    dy_t, u_t = dy_t.to(u_t.dtype).contiguous(), u_t.contiguous()
    du_t = launch.toeplitz(dy_t, taps.contiguous(), ahead, cu_seqlens, mirror=True)
    return du_t, launch.tap_gradient(u_t, dy_t, taps.shape[1], ahead, cu_seqlens)


@long_convolution_toeplitz_backward.register_fake
def _(dy_t: Tensor, u_t: Tensor, taps: Tensor, ahead: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return u_t.new_empty(u_t.shape), taps.new_empty(taps.shape)


@torch.library.custom_op("zoo::long_convolution_plain", mutates_args=())
def long_convolution_plain(x: Tensor, taps: Tensor, ahead: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Without gates, in one operator: y [B,T,D] of x, taps [D,W] float32; and x as [D,B,length] for the backward."""
    from zoo.ops.long_convolution.kernels import gates, launch

    u_t = gates.time_last(x, None, x.dtype, row_length(x, cu_seqlens))
    y_t = launch.toeplitz(u_t, taps.contiguous(), ahead, cu_seqlens, mirror=False)
    return gates.time_first(y_t[..., : x.shape[1]], None, x.dtype)[0], u_t


@long_convolution_plain.register_fake
def _(x: Tensor, taps: Tensor, ahead: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[2], x.shape[0], row_length(x, cu_seqlens)))


@torch.library.custom_op("zoo::long_convolution_plain_backward", mutates_args=())
def long_convolution_plain_backward(
    dy: Tensor, u_t: Tensor, taps: Tensor, ahead: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and taps."""
    from zoo.ops.long_convolution.kernels import gates, launch

    dy_t = gates.time_last(dy, None, u_t.dtype, u_t.shape[2])
    dtaps = launch.tap_gradient(u_t, dy_t, taps.shape[1], ahead, cu_seqlens)
    du_t = launch.toeplitz(dy_t, taps.contiguous(), ahead, cu_seqlens, mirror=True)
    return gates.time_first(du_t[..., : dy.shape[1]], None, u_t.dtype)[0], dtaps


@long_convolution_plain_backward.register_fake
def _(dy: Tensor, u_t: Tensor, taps: Tensor, ahead: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return u_t.new_empty(dy.shape), taps.new_empty(taps.shape)


def _save_plain(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, taps, ctx.ahead, cu_seqlens = inputs
    ctx.save_for_backward(output[1], taps, cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_plain(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    u_t, taps, cu_seqlens = ctx.saved_tensors
    return (*long_convolution_plain_backward(dy, u_t, taps, ctx.ahead, cu_seqlens), None, None)


def _save_in(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, _, _ = inputs
    ctx.dtype, ctx.tokens = x.dtype, x.shape[1]
    ctx.save_for_backward(*(() if gate is None else (x, gate)))


def _differentiate_in(ctx: Any, du_t: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.saved_tensors:
        return long_convolution_out(du_t, None, ctx.dtype, ctx.tokens), None, None, None
    x, gate = ctx.saved_tensors
    dx, dgate = long_convolution_gates_backward(du_t, gate, x)
    return dx, dgate, None, None


def _save_out(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y_t, gate, _, ctx.tokens = inputs
    ctx.single, ctx.length = y_t.dtype == torch.float32, y_t.shape[2]
    ctx.save_for_backward(*(() if gate is None else (y_t, gate)))


def _differentiate_out(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.saved_tensors:
        return long_convolution_in(dy, None, ctx.single, ctx.length), None, None, None
    y_t, gate = ctx.saved_tensors
    dy_t = long_convolution_in(dy, gate, ctx.single, ctx.length)
    return dy_t, long_convolution_out(y_t, dy, gate.dtype, ctx.tokens), None, None


def _save_circular(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_circular(ctx: Any, dy_n: Tensor, *_: Tensor | None) -> tuple[Tensor, ...]:
    du_n, dtaps_n = long_convolution_circular_backward(dy_n, *ctx.saved_tensors)
    return du_n, dtaps_n


def _save_skip(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_skip(ctx: Any, dy_t: Tensor) -> tuple[Tensor | None, ...]:
    u_t, D = ctx.saved_tensors
    du_t = dy_t * D.to(dy_t.dtype)[:, None, None] if ctx.needs_input_grad[1] else None
    dD = (dy_t * u_t).sum((1, 2), dtype=torch.float64).to(D.dtype) if ctx.needs_input_grad[2] else None
    return dy_t, du_t, dD


def _save_toeplitz(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u_t, taps, ctx.ahead, cu_seqlens = inputs
    ctx.save_for_backward(u_t, taps, cu_seqlens)


def _differentiate_toeplitz(ctx: Any, dy_t: Tensor) -> tuple[Tensor | None, ...]:
    u_t, taps, cu_seqlens = ctx.saved_tensors
    return (*long_convolution_toeplitz_backward(dy_t, u_t, taps, ctx.ahead, cu_seqlens), None, None)


long_convolution_in.register_autograd(_differentiate_in, setup_context=_save_in)
long_convolution_out.register_autograd(_differentiate_out, setup_context=_save_out)
long_convolution_circular.register_autograd(_differentiate_circular, setup_context=_save_circular)
long_convolution_skip.register_autograd(_differentiate_skip, setup_context=_save_skip)
long_convolution_toeplitz.register_autograd(_differentiate_toeplitz, setup_context=_save_toeplitz)
long_convolution_plain.register_autograd(_differentiate_plain, setup_context=_save_plain)
for _op, _forward in (
    (long_convolution_in, True),
    (long_convolution_out, True),
    (long_convolution_circular, True),
    (long_convolution_skip, True),
    (long_convolution_toeplitz, True),
    (long_convolution_plain, True),
    (long_convolution_gates_backward, False),
    (long_convolution_toeplitz_backward, False),
    (long_convolution_plain_backward, False),
    (long_convolution_circular_backward, False),
):
    refuse_higher_order(_op, "long_convolution", has_gradient=_forward)


@flop_formula(torch.ops.zoo.long_convolution_toeplitz)
def _toeplitz_flops(u_t: Sequence[int], taps: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * u_t[0] * u_t[1] * u_t[2] * (taps[1] + min(64, u_t[2]))


@flop_formula(torch.ops.zoo.long_convolution_toeplitz_backward)
def _toeplitz_backward_flops(dy_t: Sequence[int], u_t: Sequence[int], taps: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * _toeplitz_flops(u_t, taps)


@flop_formula(torch.ops.zoo.long_convolution_plain)
def _plain_flops(x: Sequence[int], taps: Sequence[int], *_: Any, **__: Any) -> int:
    return _toeplitz_flops((x[2], *x[:2]), taps)


@flop_formula(torch.ops.zoo.long_convolution_plain_backward)
def _plain_backward_flops(dy: Sequence[int], u_t: Sequence[int], taps: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * _plain_flops(dy, taps)

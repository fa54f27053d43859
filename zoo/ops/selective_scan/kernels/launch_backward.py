"""Launches the backward kernels of the selective scan and adds up their shares of sums in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.ops.selective_scan import triton_path
from zoo.ops.selective_scan.kernels.gradients import gradient_kernel
from zoo.ops.selective_scan.kernels.launch import arriving, carry, cut, flat, prepare
from zoo.ops.selective_scan.kernels.tuning import parts_of_group
from zoo.ops.semiseparable.kernels.launch import on_device


def backward(dy: Tensor, dfinal: Tensor | None, states: Tensor, *inputs: Any) -> list[Tensor | None]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state; None for those that are absent.

    Two passes: the gradient of the state at the end of every chunk, from the last token to the first; then every chunk
    on its own. Scratch memory is two states for each chunk, and one share of dB and dC for each part of the channels.
    """
    x, dt, A, B, _, D, z, dt_bias, initial_state, _, _ = inputs
    call = prepare(*inputs)
    dy = flat(dy)
    dfinal = None if dfinal is None else dfinal.contiguous()
    batch, tokens, channels = x.shape
    groups, state = B.shape[2:]
    chunks = cut(tokens, call.sequences, triton_path.CHUNK, call.cu_seqlens)
    blocks = call.blocks
    parts, loops = parts_of_group(chunks.total * groups, triton.cdiv(channels // groups, blocks.e))
    programs = chunks.total * groups * parts

    def scratch(*shape: int, wanted: bool = True) -> Tensor:
        return torch.empty(shape if wanted else 0, dtype=torch.float32, device=x.device)

    def like(part: Tensor) -> Tensor:
        return torch.empty(part.shape, dtype=part.dtype, device=part.device)

    leaving = scratch(chunks.total, channels, state)  # becomes the shares of dA
    dinitial = scratch(call.sequences, channels, state) if initial_state is not None else None
    dx, ddt, dz = like(x), like(dt), None if z is None else like(z)
    dB, dC = scratch(groups * parts, batch * tokens, state), scratch(groups * parts, batch * tokens, state)
    dD, dbias = (scratch(chunks.total, channels, wanted=part is not None) for part in (D, dt_bias))
    tiles = scratch(programs, triton_path.CHUNK // blocks.back_tile, blocks.n, blocks.e)
    with on_device(x):
        arrived = arriving(call, dy, call.C, dfinal, reverse=True) if call.split else None
        carry(call, dy, call.C, leaving, reverse=True, given=dfinal, arrived=arrived, last=dinitial)
        gradient_kernel[(programs,)](
            call.x, call.dt, call.z, call.B, call.C, dy, call.A, call.D, call.dt_bias, call.initial_state,
            states, leaving, chunks.owner, call.cu_seqlens, tiles, dx, ddt, dz, dB, dC, dD, dbias,
            tokens, chunks.each, parts, loops,
            call.x.stride(1), call.dt.stride(1), 0 if call.z is None else call.z.stride(1),
            *call.B.stride()[1:3], *call.C.stride()[1:3], dy.stride(1), batch * tokens,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_INITIAL=initial_state is not None,
            **call.sizes | {"TILE": blocks.back_tile},
        )  # fmt: skip
    shares = (part.view(groups, parts, batch, tokens, state).sum(1).movedim(0, 2) for part in (dB, dC))
    dkey, dquery = (part.to(x.dtype).contiguous() for part in shares)
    drate = leaving.sum(0).to(A.dtype)
    dskip = None if D is None else dD.sum(0).to(D.dtype)
    doffset = None if dt_bias is None else dbias.sum(0).to(dt_bias.dtype)
    return [dx, ddt, drate, dkey, dquery, dskip, dz, doffset, dinitial]

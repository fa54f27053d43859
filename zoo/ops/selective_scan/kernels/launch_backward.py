"""Launches the backward kernels of the selective scan and adds up their shares of sums in a fixed order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.rows import cdiv
from zoo.ops.selective_scan import triton_path
from zoo.ops.selective_scan.kernels import tuning
from zoo.ops.selective_scan.kernels.gradients import gradient_kernel
from zoo.ops.selective_scan.kernels.launch import arriving, flat, prepare, sizes_of
from zoo.ops.selective_scan.kernels.tuning import slab_length


def backward(dy: Tensor, dfinal: Tensor | None, states: Tensor, *inputs: Any) -> list[Tensor | None]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state; None for those that are absent.

    Scratch memory is one share of dB and dC for each block of channels, of one slab of each segment at a time, and the
    states of one chunk for each program.
    """
    x, dt, A, B, _, D, z, dt_bias, initial_state, _, _ = inputs
    call = prepare(*inputs, table=tuning.BACK)
    dy = flat(dy)
    dfinal = None if dfinal is None else dfinal.contiguous()
    batch, tokens, channels = x.shape
    groups, state = B.shape[2:]
    segments, blocks = call.segments, call.blocks
    parts = int(cdiv(channels // groups, blocks.e))
    packed = call.cu_seqlens is not None
    slab = segments.size if packed else slab_length(segments.size, 8 * segments.total * groups * parts * state)
    slabs = int(cdiv(segments.size, slab))
    rows = batch * tokens if packed else segments.total * slab

    def scratch(*shape: int, wanted: bool = True) -> Tensor:
        return torch.empty(shape if wanted else 0, dtype=torch.float32, device=x.device)

    def like(part: Tensor) -> Tensor:
        return torch.empty(part.shape, dtype=part.dtype, device=part.device)

    def sums(*shape: int, wanted: bool = True) -> Tensor:
        return torch.zeros(shape if wanted else 0, dtype=torch.float32, device=x.device)

    dA = sums(segments.total, channels, state)
    dinitial = scratch(call.sequences, channels, state) if initial_state is not None else None
    dx, ddt, dz = like(x), like(dt), None if z is None else like(z)
    dB, dC = scratch(groups, parts, rows, state), scratch(groups, parts, rows, state)
    dD, dbias = (sums(segments.total, channels, wanted=part is not None) for part in (D, dt_bias))
    kept = scratch(call.programs, triton_path.CHUNK // blocks.tile, blocks.e, blocks.tiles * blocks.rows)
    shape = (rows, groups, state) if packed else (segments.total, slabs, slab, groups, state)
    dkey, dquery = (torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(2))
    with on_device(x):
        if call.split:
            ahead = replace(call, blocks=sizes_of(x, state, tuning.AHEAD))  # it sums over no channel either
            arrived = arriving(ahead, dy, call.C, dfinal, reverse=True)
        elif not packed:  # handed from slab to slab
            arrived = torch.zeros_like(dA) if dfinal is None else dfinal.clone()
        else:
            arrived = None
        for number in reversed(range(slabs)):
            gradient_kernel[(call.programs,)](
                call.x, call.dt, call.z, call.B, call.C, dy, call.A, call.D, call.dt_bias, call.initial_state,
                states, dfinal, arrived, segments.owner, call.cu_seqlens, kept, dx, ddt, dz, dinitial,
                dA, dB, dC, dD, dbias, tokens, segments.each, segments.size, number, slab, rows,
                call.x.stride(1), call.dt.stride(1), 0 if call.z is None else call.z.stride(1), dy.stride(1),
                HAS_D=D is not None, HAS_Z=z is not None, HAS_INITIAL=initial_state is not None,
                HAS_GIVEN=dfinal is not None, SPLIT=arrived is not None, CHUNK=triton_path.CHUNK, **call.sizes,
            )  # fmt: skip
            for total, shares in ((dkey, dB), (dquery, dC)):
                into = total if packed else total[:, number]
                into.copy_(shares.sum(1).movedim(0, 1).reshape(into.shape))
    if not packed:
        dkey, dquery = (part.flatten(1, 2)[:, : segments.size] for part in (dkey, dquery))
    dkey, dquery = (part.reshape(batch, -1, groups, state)[:, :tokens].contiguous() for part in (dkey, dquery))
    drate = dA.sum(0).to(A.dtype)
    dskip = None if D is None else dD.sum(0).to(D.dtype)
    doffset = None if dt_bias is None else dbias.sum(0).to(dt_bias.dtype)
    return [dx, ddt, drate, dkey, dquery, dskip, dz, doffset, dinitial]

"""The diagonal scan and its gradients as sequences of kernels.

A kernel ahead is the transpose of a kernel behind: its forward is the other's backward in x, and the other way round;
both directions add up in float32. Names in _t are tokens as the kernels read them: turned, or as they come.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.lti.kernels.launch import Launch, ModeGradients, pairs, planes
from zoo.ops.lti.kernels.wide_launch import WideLaunch, wide_serves


def launch_of(x: Tensor, log_a: Tensor, c: Tensor, D: Tensor | None, cu_seqlens: Tensor | None) -> Launch:
    """The kernels that serve these sizes best."""
    kind = WideLaunch if wide_serves(x.dtype, *log_a.shape[:2]) else Launch
    return kind(x, log_a, c, D, cu_seqlens)


def forward(
    x: Tensor,
    log_a: Tensor,
    c: Tensor,
    D: Tensor | None,
    c_reverse: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse_lag: int,
) -> tuple[Tensor, Tensor]:
    """y [B,T,D] in the dtype of x and the final state [S,D,M,2] float32."""
    launch = launch_of(x, log_a, c, D, cu_seqlens)
    x_t = launch.read(x)
    states, _, last, _ = launch.row_states(x_t, planes(initial_state), reverse=False, weighted=False)
    if c_reverse is None:
        y_t = launch.mix(x_t, states, reverse=False, in_place=True)
    else:
        y_t = launch.mix(x_t, states, reverse=False, dtype=torch.float32)
        ahead = launch.with_kernel(log_a, c_reverse, reverse_lag)
        coming, _, _, _ = ahead.row_states(x_t, None, reverse=True, weighted=False)
        y_t = ahead.mix(x_t, coming, reverse=True, onto=y_t)
        del coming
    del x_t, states
    return launch.written(y_t, x.shape, x.dtype), pairs(last)


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    log_a: Tensor,
    c: Tensor,
    D: Tensor | None,
    c_reverse: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse_lag: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_a, c, D, c_reverse and the initial state; empty tensors for those that are absent.

    dfinal: None for zeros.
    The states before rows of tokens are computed anew. Orders of summation are fixed, so gradients are the
    same in every run. To the kernel ahead, dy are tokens that its transpose scans, and x what it is compared with.
    """
    launch = launch_of(x, log_a, c, D, cu_seqlens)
    dy_t, dlast = launch.read(dy.to(x.dtype)), planes(dfinal)
    leaving, _, dfirst, _ = launch.row_states(dy_t, dlast, reverse=True, weighted=False)
    dx_t = launch.mix(dy_t, leaving, reverse=True, dtype=None if c_reverse is None else torch.float32)
    del leaving
    x_t = launch.read(x)
    other, dc_reverse = None, x.new_empty(0)
    if c_reverse is not None:
        ahead = launch.with_kernel(log_a, c_reverse, reverse_lag)
        states, slopes, _, _ = ahead.row_states(dy_t, None, reverse=False, weighted=True)
        dx_t = ahead.mix(dy_t, states, reverse=False, onto=dx_t)
        other = torch.empty(log_a.shape, dtype=torch.float64, device=x.device)
        dc_reverse = torch.empty(c.shape, dtype=c_reverse.dtype, device=x.device)
        made = ahead.shared_gradients(dy_t, x_t, states, slopes)
        ahead.mode_gradients(made, ModeGradients(other, dc_reverse, None), None, None)
    dx = launch.written(dx_t, x.shape, x.dtype)
    del dx_t
    states, slopes, _, last_slope = launch.row_states(x_t, planes(initial_state), reverse=False, weighted=True)
    dlog_a, dc, dskip = (
        torch.empty(part.shape if part is not None else 0, dtype=(x if part is None else part).dtype, device=x.device)
        for part in (log_a, c, D)
    )
    made = launch.shared_gradients(x_t, dy_t, states, slopes)
    grads = ModeGradients(dlog_a, dc, None if D is None else dskip)
    launch.mode_gradients(made, grads, None if dlast is None else (dlast, last_slope), other)
    dinitial = pairs(dfirst).to(initial_state.dtype) if initial_state is not None else x.new_empty(0)
    return dx, dlog_a, dc, dskip, dc_reverse, dinitial

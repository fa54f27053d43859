"""The equations of the Mamba-1 layer, one token at a time, in plain PyTorch: what the fast layer is held to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo_mamba.config import MambaConfig


def mamba_layer_reference(
    config: MambaConfig,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The layer on whole sequences, everything in the dtype of x (float64 for an oracle). Differentiable.

    parameters: those of `MambaMixer`, by name, in the dtype of x. x: [B,T,D].
    state: past convolution inputs [B,E,W-1] and recurrent state [B,E,N]; None before the first token.
    Returns y [B,T,D] and the state after the last token.
    Source: Gu & Dao 2023, arXiv 2312.00752, section 3.
    """
    batch, width = x.shape[0], config.channels
    projected = x @ parameters["in_proj.weight"].T + parameters.get("in_proj.bias", 0)
    inputs, z = projected[..., :width], projected[..., width:]
    past = x.new_zeros(batch, width, config.d_conv - 1) if state is None else state[0]
    history = torch.cat([past.transpose(1, 2), inputs], dim=1)  # [B, W-1+T, E]
    hidden = x.new_zeros(batch, width, config.d_state) if state is None else state[1]

    outputs = []
    for t in range(x.shape[1]):
        window = history[:, t : t + config.d_conv]  # [B, W, E]
        u = _silu((window * parameters["conv1d.weight"][:, 0].T).sum(1) + parameters.get("conv1d.bias", 0))
        steps, B, C = (u @ parameters["x_proj.weight"].T).split([config.rank, config.d_state, config.d_state], dim=-1)
        dt = (steps @ parameters["dt_proj.weight"].T + parameters["dt_proj.bias"]).exp().log1p()  # [B, E]
        decay = (-dt[..., None] * parameters["A_log"].exp()).exp()  # [B, E, N]
        hidden = decay * hidden + (dt * u)[..., None] * B[:, None]
        outputs.append((hidden * C[:, None]).sum(-1) + parameters["D"] * u)
    y = (torch.stack(outputs, dim=1) * _silu(z)) @ parameters["out_proj.weight"].T + parameters.get("out_proj.bias", 0)
    return y, (history[:, x.shape[1] :].transpose(1, 2), hidden)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())

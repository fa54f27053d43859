"""The equations of the SSD layer, one token at a time, in plain PyTorch: what the fast layer is held to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo_ssd.config import SsdConfig


def ssd_layer_reference(
    config: SsdConfig,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The layer on whole sequences, everything in the dtype of x (float64 for an oracle). Differentiable.

    parameters: those of `SsdMixer`, by name, in the dtype of x. x: [B,T,D].
    state: past convolution inputs [B,H P + 2 G N,W-1] and recurrent state [B,H,P,N]; None before the first token.
    Returns y [B,T,D] and the state after the last token.
    Source: Dao & Gu 2024, arXiv 2405.21060, section 7.
    """
    projected = x @ parameters["in_proj.weight"].T + parameters.get("in_proj.bias", 0)
    inner, mlp = config.ssm_channels, config.mlp_channels
    mlp_gate, mlp_value = projected[..., :mlp], projected[..., mlp : 2 * mlp]
    z, xBC, dt = projected[..., 2 * mlp :].split([inner, config.conv_channels, config.n_heads], dim=-1)
    past = x.new_zeros(x.shape[0], config.conv_channels, config.d_conv - 1) if state is None else state[0]
    history = torch.cat([past.transpose(1, 2), xBC], dim=1)  # [B, W-1+T, H P + 2 G N]
    hidden = _first_state(config, parameters, x) if state is None else state[1]

    outputs = []
    for t in range(x.shape[1]):
        window = history[:, t : t + config.d_conv]  # [B, W, H P + 2 G N]
        convolved = (window * parameters["conv1d.weight"][:, 0].T).sum(1) + parameters.get("conv1d.bias", 0)
        y, hidden = _one_token(config, parameters, _silu(convolved), dt[:, t], hidden)
        outputs.append(y)
    y = _gate(config, parameters, torch.stack(outputs, dim=1), z)
    y = torch.cat([_silu(mlp_gate) * mlp_value, y], dim=-1)
    y = y @ parameters["out_proj.weight"].T + parameters.get("out_proj.bias", 0)
    return y, (history[:, x.shape[1] :].transpose(1, 2), hidden)


def _one_token(
    config: SsdConfig, parameters: Mapping[str, Tensor], xBC: Tensor, dt: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """h = exp(dt A) h + dt x B^T and y = h C + D x.

    xBC: [B,H P + 2 G N]. dt: [B,H]. hidden: h [B,H,P,N]. Returns y [B,H P] and the next h.
    """
    batch, heads, groups = xBC.shape[0], config.n_heads, config.n_groups
    x = xBC[:, : config.ssm_channels].reshape(batch, heads, config.head_dim)
    B, C = xBC[:, config.ssm_channels :].reshape(batch, 2, groups, config.d_state).unbind(1)
    reads = torch.arange(heads, device=xBC.device) // (heads // groups)  # the group that each head reads
    step = (dt + parameters["dt_bias"]).exp().log1p().clamp(*config.dt_limit)  # [B, H]
    decay = (-step * parameters["A_log"].exp()).exp()
    hidden = decay[..., None, None] * hidden + (step[..., None] * x)[..., None] * B[:, reads, None]
    y = (hidden * C[:, reads, None]).sum(-1).reshape(batch, -1)
    per_channel = config.ssm_channels // parameters["D"].numel()  # P for a skip per head, 1 for one per channel
    return y + parameters["D"].repeat_interleave(per_channel) * x.reshape(batch, -1), hidden


def _first_state(config: SsdConfig, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The recurrent state before the first token, [B,H,P,N]."""
    zeros = x.new_zeros(x.shape[0], config.n_heads, config.head_dim, config.d_state)
    return zeros + parameters["init_states"] if config.learnable_init_states else zeros


def _gate(config: SsdConfig, parameters: Mapping[str, Tensor], y: Tensor, z: Tensor) -> Tensor:
    """y [B,T,H P] gated by z, normalised before or after or not at all."""
    if not config.rmsnorm:
        return y * _silu(z)
    if not config.norm_before_gate:
        y = y * _silu(z)
    parts = y.reshape(*y.shape[:2], config.norm_parts, -1)
    root = (parts.square().sum(-1, keepdim=True) / parts.shape[-1] + config.norm_eps).sqrt()
    y = (parts / root).reshape(y.shape) * parameters["norm.weight"]
    return y * _silu(z) if config.norm_before_gate else y


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())

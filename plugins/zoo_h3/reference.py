"""The equations of the H3 layer, one token at a time, in complex numbers: what the fast layer is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from zoo_h3.config import H3Config

RATES: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "softplus": lambda x: x.exp().log1p(),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "relu": lambda x: x.clamp(min=0) + 1e-4,
    "none": lambda x: x,
}


def h3_layer_reference(
    config: H3Config,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The layer on whole sequences, everything in the dtype of x (float64 for an oracle). Differentiable.

    parameters: those of `H3Mixer`, by name, in the dtype of x. x: [B,T,D].
    state: of the shift SSM [B,D,W] and of the diagonal one [B,H,M,P,P] (complex); None before the first token.
    Returns y [B,T,D] and the states after the last token.
    Source: Fu, Dao et al. 2023, arXiv 2212.14052, algorithm 1.
    """
    batch, heads, width = x.shape[0], config.heads, config.head_dim
    abar, bbar = _discrete(config, parameters)
    C = torch.view_as_complex(parameters["C"])
    projected = x @ parameters["in_proj.weight"].T + parameters.get("in_proj.bias", 0)
    if state is None:
        shift = x.new_zeros(batch, config.d_model, config.taps)
        diagonal = torch.zeros(batch, heads, config.modes, width, width, dtype=abar.dtype, device=x.device)
    else:
        shift, diagonal = state
    outputs = []
    for t in range(x.shape[1]):
        q, k, v = projected[:, t].chunk(3, -1)
        shift = torch.cat([torch.zeros_like(shift[..., :1]), shift[..., :-1]], -1)
        shift = shift + parameters["shift_B"] * k.unsqueeze(-1)
        key = (parameters["shift_C"] * shift).sum(-1) + parameters["shift_D"] * k
        q, key, v = (part.reshape(batch, heads, width) for part in (q, key, v))
        pair = key.unsqueeze(-1) * v.unsqueeze(-2)  # [B,H,P,P]
        diagonal = abar[..., None, None] * diagonal + bbar[..., None, None] * pair.unsqueeze(2)
        read = 2 * (C[..., None, None] * diagonal).sum(2).real + parameters["D"][:, None, None] * pair
        outputs.append((q.unsqueeze(-1) * read).sum(-2).flatten(1))
    y = torch.stack(outputs, 1) @ parameters["out_proj.weight"].T + parameters.get("out_proj.bias", 0)
    return y, (shift, diagonal)


def _discrete(config: H3Config, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Abar and Bbar of every head, complex [H,M]; head h has the modes of SSM h mod S."""
    which = torch.arange(config.heads) % config.ssms
    A = torch.complex(-RATES[config.real_transform](parameters["A_real"]), parameters["A_imag"])[which]
    B = torch.view_as_complex(parameters["B"])[which]
    step = parameters["log_dt"].exp().unsqueeze(-1)
    if config.disc == "zoh":
        abar = (step * A).exp()
        return abar, B * (abar - 1) / A
    return (1 + step * A / 2) / (1 - step * A / 2), B * step / (1 - step * A / 2)

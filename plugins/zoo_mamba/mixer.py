"""The Mamba-1 layer: projection, short convolution, selective scan with its gate, projection.

Source: Gu & Dao 2023, arXiv 2312.00752; parameters as in state-spaces/mamba, mamba_ssm/modules/mamba_simple.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.ops.in_place import may_overwrite, steps_in_place
from zoo.ops.selective_scan import flops as scan_flops
from zoo.ops.selective_scan import mixing_matrix, selective_scan
from zoo.ops.selective_scan.step import selective_scan_step
from zoo.ops.short_convolution import flops as convolution_flops
from zoo.ops.short_convolution.step import convolve_next
from zoo.ops.ssd import time_step

from sequence_mixer import Cost, MatrixForm, SequenceMixer, State
from sequence_mixer.shapes import accumulation_dtype
from zoo_mamba.config import MambaConfig, capabilities_of


class MambaState(State):
    """What the layer carries from one piece of a sequence to the next.

    conv: [B,E,W-1], the last inputs of the short convolution, oldest first, in the activation dtype.
    ssm: [B,E,N], the state of the recurrence, in the accumulation dtype.
    """

    conv: Tensor
    ssm: Tensor


class _Selected(NamedTuple):
    """What the scan mixes and by what: values x and raw time steps dt [B,T,E], keys B and queries C [B,T,N]."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor


class MambaMixer(SequenceMixer):
    """Mamba-1's layer, [B,T,D] -> [B,T,D].

    Parameters, with E = expand * D and R = dt_rank: in_proj.weight [2 E,D], rows in the order values, gate;
    conv1d.weight [E,1,W]; x_proj.weight [R + 2 N,E], rows in the order time steps, B, C; dt_proj.weight [E,R] and
    dt_proj.bias [E]; A_log [E,N]; D [E]; out_proj.weight [D,E].
    """

    config: MambaConfig
    state_type = MambaState

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config, capabilities_of(config))
        channels, state, rank = config.channels, config.d_state, config.rank
        self.in_proj = nn.Linear(config.d_model, 2 * channels, bias=config.bias)
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels, bias=config.conv_bias)
        self.x_proj = nn.Linear(channels, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, channels)
        start_time_steps(self.dt_proj, config)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = nn.Linear(channels, config.d_model, bias=config.bias)

    def mix(
        self,
        x: Tensor,
        state: MambaState | None,
        *,
        cu_seqlens: Tensor | None,
        padding_mask: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, MambaState]:
        """See `SequenceMixer.mix`."""
        inputs, z = self.in_proj(x).chunk(2, dim=-1)
        selected, conv = self._select(inputs, None if state is None else state.conv, cu_seqlens, donate)
        if state is not None and steps_in_place(
            "selective_scan_step", self.backend, state.ssm, selected.x, donate=donate, cu_seqlens=cu_seqlens
        ):
            values, dt, keys, queries = (part.squeeze(1) for part in selected)
            step = selective_scan_step(
                values,
                dt,
                self._rates(x.dtype),
                keys,
                queries,
                state.ssm,
                D=self.D,
                z=z.squeeze(1),
                dt_bias=self.dt_proj.bias,
                dt_softplus=True,
                backend=self.backend,
            )
            return self.out_proj(step.unsqueeze(1)), MambaState(state.conv.copy_(conv), state.ssm)
        y, ssm = selective_scan(
            *selected[:2],
            self._rates(x.dtype),
            *selected[2:],
            D=self.D,
            z=z,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
            initial_state=None if state is None else state.ssm,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        after = MambaState(conv, ssm)
        if donate and state is not None and may_overwrite(state.conv, state.ssm):
            after = MambaState(state.conv.copy_(conv), state.ssm.copy_(ssm))
        return self.out_proj(y), after

    def empty_state(
        self, batch_size: int, capacity: int | None, device: torch.device, dtype: torch.dtype
    ) -> MambaState:
        """Zeros. The state does not grow, so `capacity` needs no room."""
        config = self.config
        return MambaState(
            torch.zeros(batch_size, config.channels, config.d_conv - 1, device=device, dtype=dtype),
            torch.zeros(batch_size, config.channels, config.d_state, device=device, dtype=accumulation_dtype(dtype)),
        )

    def matrix_form(self, x: Tensor) -> MatrixForm:
        """M^e_ij = sum_n C_in exp(A_en sum_{j<r<=i} dt_re) B_jn dt_je + D_e d_ij, one matrix per channel e.

        x: [B,T,D]. There are H = E heads of one channel: build some with `heads(slice)`. The gate is in `finish`.
        """
        self._check_call(x, None, None)
        inputs, z = self.in_proj(x).chunk(2, dim=-1)
        selected, _ = self._select(inputs, None, None)
        inner = accumulation_dtype(selected.x.dtype)
        step = time_step(selected.dt, self.dt_proj.bias, True, (0.0, math.inf), inner)
        rates, skip = self._rates(x.dtype), self.D.to(inner)
        keys, queries = (part.to(inner).unsqueeze(2) for part in (selected.B, selected.C))

        def build(which: slice) -> Tensor:
            steps = step[:, :, which]
            shared = (-1, -1, steps.shape[2], -1)
            mixed = mixing_matrix(steps, rates[which], keys.expand(shared), queries.expand(shared))
            return mixed + skip[which, None, None] * torch.eye(steps.shape[1], device=x.device, dtype=inner)

        def finish(mixed: Tensor) -> Tensor:
            gated = mixed.squeeze(3) * F.silu(z.to(inner))
            out: Tensor = self.out_proj(gated.to(z.dtype))
            return out

        return MatrixForm(build, self.config.channels, selected.x.unsqueeze(3), finish)

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        """FLOPs of four projections, the convolution and the scan."""
        config, tokens = self.config, batch_size * length
        channels, state = config.channels, config.d_state
        projected = 3 * config.d_model + 2 * config.rank + 2 * state  # in, out; to and from the time steps; B, C
        flops = 2 * tokens * channels * projected
        flops += convolution_flops(batch_size, length, channels, config.d_conv)
        flops += scan_flops(batch_size, length, channels, state)
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return Cost(
            flops=flops,
            bytes=dtype.itemsize * (parameters + 2 * tokens * config.d_model),
            parameters=parameters,
            state_elements=batch_size * channels * (config.d_conv - 1 + state),
        )

    def parameter_groups(self) -> Mapping[str, dict[str, float]]:
        """No weight decay on decay rates and skip."""
        return {name: {"weight_decay": 0.0} for name in ("A_log", "D")}

    def _rates(self, dtype: torch.dtype) -> Tensor:
        """A = -exp(A_log) [E,N] in the accumulation dtype of activations in `dtype`."""
        return -self.A_log.to(accumulation_dtype(dtype)).exp()

    def _select(
        self, inputs: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, donate: bool = False
    ) -> tuple[_Selected, Tensor]:
        """What the scan takes, from the projected inputs [B,T,E], and the convolution's state [B,E,W-1]."""
        x, conv = convolve_next(
            inputs,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            past,
            activation="silu",
            cu_seqlens=cu_seqlens,
            donate=donate,
            backend=self.backend,
        )
        config = self.config
        dt, B, C = self.x_proj(x).split([config.rank, config.d_state, config.d_state], dim=-1)
        return _Selected(x, F.linear(dt, self.dt_proj.weight), B, C), conv


def start_time_steps(dt_proj: nn.Linear, config: MambaConfig) -> None:
    """Initial values of dt_proj: small weights, and biases that give the time steps of the config.

    The bias is softplus^-1 of steps drawn log-uniformly from [dt_min, dt_max] and raised to dt_init_floor.
    """
    spread = config.dt_scale * config.rank**-0.5
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    with torch.no_grad():
        if config.dt_init == "constant":
            dt_proj.weight.fill_(spread)
        else:
            dt_proj.weight.uniform_(-spread, spread)
        steps = (low + (high - low) * torch.rand(config.channels)).exp().clamp(min=config.dt_init_floor)
        dt_proj.bias.copy_(steps + (-torch.expm1(-steps)).log())

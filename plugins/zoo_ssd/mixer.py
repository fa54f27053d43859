"""The SSD layer: projection, short convolution, state space, gated norm, projection.

Source: Dao & Gu 2024, arXiv 2405.21060, section 7; parameters as in state-spaces/mamba, mamba_ssm/modules/mamba2.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.ops.dispatch import without_autocast
from zoo.ops.in_place import may_overwrite, steps_in_place
from zoo.ops.norm import flops as norm_flops
from zoo.ops.norm import gated_rms_norm
from zoo.ops.short_convolution import flops as convolution_flops
from zoo.ops.short_convolution.step import convolve_next
from zoo.ops.ssd import flops as ssd_flops
from zoo.ops.ssd import ssd
from zoo.ops.ssd.block import serves as block_serves
from zoo.ops.ssd.block import ssd_block
from zoo.ops.ssd.step import ssd_step
from zoo.ops.ssd.time_step import time_step

from sequence_mixer import Cost, MatrixForm, SequenceMixer, State
from sequence_mixer.shapes import accumulation_dtype
from zoo_ssd.config import SsdConfig, capabilities_of
from zoo_ssd.matrix import initial_state_output, ssd_factors


class SsdState(State):
    """What the layer carries from one piece of a sequence to the next.

    conv: [B,H P + 2 G N,W-1], the last inputs of the short convolution, oldest first, in the activation dtype.
    ssm: [B,H,P,N], the state of the recurrence, in the accumulation dtype.
    """

    conv: Tensor
    ssm: Tensor


class _Gates(NamedTuple):
    """What the output side needs: gate z [B,T,H P] of the SSM, gate and value [B,T,E - H P] of the MLP."""

    z: Tensor
    mlp_gate: Tensor
    mlp_value: Tensor


class _ScaledNorm(nn.Module):
    """Holds the weight [H P] of the gated norm under the name `norm.weight`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))


class SsdMixer(SequenceMixer):
    """Mamba-2's layer, [B,T,D] -> [B,T,D].

    Parameters, with E = expand * D: in_proj.weight [2(E - H P) + 2 H P + 2 G N + H, D], rows in the order MLP gate, MLP
    value, gate, x, B, C, time steps; conv1d.weight [H P + 2 G N,1,W]; dt_bias, A_log [H]; D [H] or [H P]; norm.weight
    [H P]; out_proj.weight [D,E]; init_states [H,P,N] if learnt.
    """

    config: SsdConfig
    state_type = SsdState

    def __init__(self, config: SsdConfig) -> None:
        super().__init__(config, capabilities_of(config))
        self.in_proj = nn.Linear(config.d_model, config.projected_channels, bias=config.bias)
        channels = config.conv_channels
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels, bias=config.conv_bias)
        if config.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -config.conv_init, config.conv_init)
        if config.learnable_init_states:
            self.init_states = nn.Parameter(torch.zeros(config.n_heads, config.head_dim, config.d_state))
        self.dt_bias = nn.Parameter(initial_dt_bias(config))
        self.A_log = nn.Parameter(torch.empty(config.n_heads).uniform_(*config.a_init_range).log())
        self.D = nn.Parameter(torch.ones(config.ssm_channels if config.d_has_head_dim else config.n_heads))
        if config.rmsnorm:
            self.norm = _ScaledNorm(config.ssm_channels)
        self.out_proj = nn.Linear(config.expand * config.d_model, config.d_model, bias=config.bias)

    def mix(
        self,
        x: Tensor,
        state: SsdState | None,
        *,
        cu_seqlens: Tensor | None,
        padding_mask: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, SsdState]:
        """See `SequenceMixer.mix`."""
        projected = self.in_proj(x)
        if state is None and self._is_one_block(projected):
            return self._mix_block(projected, cu_seqlens)
        gates, xBC, dt = self._split(projected)
        values, B, C, conv = self._convolve(xBC, None if state is None else state.conv, cu_seqlens, donate)
        rates = -self.A_log.to(accumulation_dtype(x.dtype)).exp()
        skip = self.D.unflatten(0, (-1, self.config.head_dim)) if self.config.d_has_head_dim else self.D
        if state is not None and steps_in_place(
            "ssd_step", self.backend, state.ssm, values, donate=donate, cu_seqlens=cu_seqlens
        ):
            y = ssd_step(
                values.squeeze(1),
                dt.squeeze(1),
                rates,
                B.squeeze(1),
                C.squeeze(1),
                state.ssm,
                D=skip,
                dt_bias=self.dt_bias,
                dt_softplus=True,
                dt_limit=self.config.dt_limit,
                backend=self.backend,
            )
            return self._finish(y.flatten(1).unsqueeze(1), gates), SsdState(state.conv.copy_(conv), state.ssm)
        y, ssm = ssd(
            values,
            dt,
            rates,
            B,
            C,
            D=skip,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.config.dt_limit,
            initial_state=self._states_before(projected, cu_seqlens) if state is None else state.ssm,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        after = SsdState(conv, ssm)
        if donate and state is not None and may_overwrite(state.conv, state.ssm):
            after = SsdState(state.conv.copy_(conv), state.ssm.copy_(ssm))
        return self._finish(y.flatten(2), gates), after

    def empty_state(self, batch_size: int, capacity: int | None, device: torch.device, dtype: torch.dtype) -> SsdState:
        """Zeros, or the learnt states (differentiable). The state does not grow, so `capacity` needs no room."""
        config, inner = self.config, accumulation_dtype(dtype)
        conv = torch.zeros(batch_size, config.conv_channels, config.d_conv - 1, device=device, dtype=dtype)
        if config.learnable_init_states:  # rows of their own, never a view of the parameter: states may be donated
            learnt = self.init_states.to(device=device, dtype=inner)
            return SsdState(conv, learnt.unsqueeze(0).repeat(batch_size, 1, 1, 1))
        sizes = (batch_size, config.n_heads, config.head_dim, config.d_state)
        return SsdState(conv, torch.zeros(sizes, device=device, dtype=inner))

    def matrix_form(self, x: Tensor) -> MatrixForm:
        """M^h_ij = exp(sum_{j<r<=i} dt_r A) <C_i, B_j> dt_j + D d_ij, one matrix per head.

        x: [B,T,D]. With D per channel there is one matrix per channel (H P heads of one channel). Learnt initial states
        add an output that depends on no value; `finish` adds it.
        """
        self._check_call(x, None, None)
        gates, xBC, dt = self._split(self.in_proj(x))
        values, B, C, _ = self._convolve(xBC, None, None)
        inner = accumulation_dtype(values.dtype)
        steps = time_step(dt, self.dt_bias, True, self.config.dt_limit, inner)
        log_decay = -steps * self.A_log.to(inner).exp()
        heads = self.config.n_heads // self.config.n_groups
        left, right = (t.to(inner).repeat_interleave(heads, 2) for t in (C, B))
        offset = None
        if self.config.learnable_init_states:
            offset = initial_state_output(log_decay, left, self.init_states.to(inner)).flatten(2)
        right = right * steps.unsqueeze(-1)
        if self.config.d_has_head_dim:
            width = self.config.head_dim
            left, right, log_decay = (t.repeat_interleave(width, 2) for t in (left, right, log_decay))
            values = values.flatten(2).unsqueeze(-1)
        factors = ssd_factors(log_decay, left, right, self.D.to(inner))

        def build(which: slice) -> Tensor:
            scores = torch.einsum("bihn,bjhn->bhij", factors.left[:, :, which], factors.right[:, :, which])
            assert factors.skip is not None
            return factors.mask(which) * scores + torch.diag_embed(factors.skip[:, :, which].transpose(1, 2))

        def finish(mixed: Tensor) -> Tensor:
            y = mixed.flatten(2)
            return self._finish((y if offset is None else y + offset).to(gates.z.dtype), gates)

        return MatrixForm(build, values.shape[2], values, finish, factors)

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        """FLOPs of the chunked path: two projections, the convolution and the scan."""
        config = self.config
        tokens, expanded = batch_size * length, config.expand * config.d_model
        flops = 2 * tokens * config.d_model * (config.projected_channels + expanded)
        flops += convolution_flops(batch_size, length, config.conv_channels, config.d_conv)
        flops += ssd_flops(batch_size, length, config.n_heads, config.n_groups, config.d_state, config.head_dim)
        flops += norm_flops(tokens, config.ssm_channels)
        parameters = sum(parameter.numel() for parameter in self.parameters())
        row = config.conv_channels * (config.d_conv - 1) + config.ssm_channels * config.d_state
        return Cost(
            flops=flops,
            bytes=dtype.itemsize * (parameters + 2 * tokens * config.d_model),
            parameters=parameters,
            state_elements=batch_size * row,
        )

    def parameter_groups(self) -> Mapping[str, dict[str, float]]:
        """No weight decay on decay rates, skip, time step bias and learnt states."""
        names = ["A_log", "D", "dt_bias"] + ["init_states"] * self.config.learnable_init_states
        return {name: {"weight_decay": 0.0} for name in names}

    def _is_one_block(self, projected: Tensor) -> bool:
        """Whether everything between the projections goes to kernels that one operator can join."""
        config = self.config
        if config.mlp_channels or config.d_has_head_dim or not config.rmsnorm or config.dt_limit[0] < 0.0:
            return False
        group = config.ssm_channels // config.norm_parts
        sizes = (config.ssm_channels, config.n_heads, config.n_groups, config.d_state, config.d_conv, group)
        return block_serves(projected, *sizes, self.backend)

    def _mix_block(self, projected: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, SsdState]:
        """`mix` without a state: convolution, SSD and norm in one operator."""
        config = self.config
        with without_autocast(projected):
            y, conv, ssm, _, _ = ssd_block(
                projected,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                -self.A_log.to(accumulation_dtype(projected.dtype)).exp(),
                self.D,
                self.dt_bias,
                self.norm.weight,
                self._states_before(projected, cu_seqlens),
                cu_seqlens,
                config.n_groups,
                config.d_state,
                *config.dt_limit,
                config.norm_eps,
                config.ssm_channels // config.norm_parts,
                config.norm_before_gate,
            )
        return self.out_proj(y), SsdState(conv, ssm)

    def _split(self, projected: Tensor) -> tuple[_Gates, Tensor, Tensor]:
        """Gates, convolution input [B,T,H P + 2 G N] and raw time steps [B,T,H] from the columns of `projected`."""
        config = self.config
        widths = [config.mlp_channels] * 2 + [config.ssm_channels, config.conv_channels, config.n_heads]
        mlp_gate, mlp_value, z, xBC, dt = projected.split(widths, dim=-1)
        return _Gates(z, mlp_gate, mlp_value), xBC, dt

    def _convolve(
        self, xBC: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, donate: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values [B,T,H,P], B and C [B,T,G,N] after convolution and SiLU, and the convolution's state."""
        convolved, conv = convolve_next(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            past,
            activation="silu",
            cu_seqlens=cu_seqlens,
            donate=donate,
            backend=self.backend,
        )
        config = self.config
        keys = config.n_groups * config.d_state
        values, B, C = convolved.split([config.ssm_channels, keys, keys], dim=-1)
        B, C = (t.unflatten(-1, (config.n_groups, config.d_state)) for t in (B, C))
        return values.unflatten(-1, (config.n_heads, config.head_dim)), B, C, conv

    def _states_before(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
        """Learnt states for every sequence of the call, [B,H,P,N] or [S,H,P,N]; None for zeros."""
        if not self.config.learnable_init_states:
            return None
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        return self.init_states.unsqueeze(0).expand(sequences, -1, -1, -1)

    def _finish(self, y: Tensor, gates: _Gates) -> Tensor:
        """Gate and norm of the SSM's y [B,T,H P], the MLP beside it, and the output projection to [B,T,D]."""
        config = self.config
        if config.rmsnorm:
            y = gated_rms_norm(
                y,
                gates.z,
                self.norm.weight,
                eps=config.norm_eps,
                group_size=config.ssm_channels // config.norm_parts,
                norm_before_gate=config.norm_before_gate,
                backend=self.backend,
            )
        else:
            y = y * F.silu(gates.z)
        if config.mlp_channels:
            y = torch.cat([F.silu(gates.mlp_gate) * gates.mlp_value, y], dim=-1)
        out: Tensor = self.out_proj(y)
        return out


def initial_dt_bias(config: SsdConfig) -> Tensor:
    """[H]: softplus^-1 of time steps drawn log-uniformly from [dt_min, dt_max] and raised to dt_init_floor."""
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    steps = (low + (high - low) * torch.rand(config.n_heads)).exp().clamp(min=config.dt_init_floor)
    return steps + (-torch.expm1(-steps)).log()

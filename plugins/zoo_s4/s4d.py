"""The S4D layer: a diagonal state space for each channel, run by `zoo.ops.lti_scan`.

Source: Gu et al. 2022, arXiv 2206.11893; parameters as in state-spaces/s4, S4Block(mode='diag') and models/s4/s4d.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from zoo.ops.in_place import kernel_steps, may_overwrite, steps_in_place
from zoo.ops.lti import flops as lti_flops
from zoo.ops.lti import lti_scan
from zoo.ops.lti.step import lti_scan_step
from zoo.ops.lti.system import factored_step, step_factors
from zoo.ops.lti.vandermonde import lti_kernel

from sequence_mixer import Cost, State
from sequence_mixer.shapes import accumulation_dtype
from zoo_s4.config import S4dConfig
from zoo_s4.diagonal import discretise
from zoo_s4.layer import StateSpaceLayer, complex_normal
from zoo_s4.parameters import complex_of, initial_systems, pairs, parameter_of, shared


class S4dState(State):
    """Sums over the past, before B and C: h_t = A' h_{t-1} + x_t, in the accumulation dtype.

    ssm: [B,D,N/2,2]; [B,D,N] if the modes are real. One for all readouts of a channel.
    """

    ssm: Tensor


class S4dMixer(StateSpaceLayer):
    """S4D: h' = A' h + x, y = 2 Re sum_n C_n B'_n h_n + D x.

    Parameters beside those of StateSpaceLayer: B [1,S,N/2,2] unless `use_b` is off. With `real` modes, B and C have no
    last axis and there is no A_imag.
    """

    config: S4dConfig
    state_type = S4dState

    def __init__(self, config: S4dConfig) -> None:
        super().__init__(config)
        width = 2 * config.pairs
        initial = initial_systems(config, width, 2)
        self.A_real = nn.Parameter(parameter_of(-initial.a.real, config.real_transform).float())
        B = initial.B.unsqueeze(0)
        C = complex_normal(config.kernels, config.d_model, config.pairs)
        if config.real:
            self.C = nn.Parameter(C[..., 0].clone())
        else:
            self.A_imag = nn.Parameter(parameter_of(-initial.a.imag, config.imag_transform).float())
            self.C = nn.Parameter(C)
        if config.use_b:
            self.B = nn.Parameter(B.real.float() if config.real else pairs(B))

    def mix(
        self,
        x: Tensor,
        state: S4dState | None,
        *,
        cu_seqlens: Tensor | None,
        padding_mask: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, S4dState | None]:
        """See `SequenceMixer.mix`."""
        config = self.config
        if self.backend == "fft" and state is None:  # as one convolution, which serves packed rows and needs no state
            return self._finish(self._convolve(x, cu_seqlens, "fft")), None
        if state is not None and self._steps(state, x, cu_seqlens, donate):
            return self._finish(self._step(x.squeeze(1), state.ssm).unsqueeze(1)), state
        log_a, c = self._modes()
        readouts = c.unflatten(0, (-1, config.channels)).flatten(1, 2)  # [1 or 2, channels D, N/2, 2]
        y, final = lti_scan(
            self._repeated(x),
            log_a.repeat(config.channels, 1, 1),
            readouts[0],
            D=self.D.flatten(),
            c_reverse=None if config.causal else readouts[1],
            reverse_lag=1,
            initial_state=None if state is None else self._as_pairs(state.ssm).repeat(1, config.channels, 1, 1),
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        ssm = final[:, : config.d_model]
        if config.real:
            ssm = ssm[..., 0].contiguous()
        if donate and state is not None and may_overwrite(state.ssm):
            ssm = state.ssm.copy_(ssm)
        return self._finish(y), S4dState(ssm)

    def _steps(self, state: S4dState, x: Tensor, cu_seqlens: Tensor | None, donate: bool) -> bool:
        """Whether the state is overwritten by the operator itself: one readout, and complex modes as it keeps them."""
        plain = self.config.causal and self.config.channels == 1 and not self.config.real
        return plain and steps_in_place(
            "lti_scan_step", self.backend, state.ssm, x, donate=donate, cu_seqlens=cu_seqlens
        )

    def _step(self, x: Tensor, ssm: Tensor) -> Tensor:
        """y [B,D] of one token x [B,D]; ssm [B,D,N/2,2] is overwritten."""
        config, skip = self.config, self.D.flatten()
        if not kernel_steps("lti_scan_step", self.backend, x, {"modes": config.pairs}):
            log_a, c = self._modes()
            return lti_scan_step(x, log_a, c[0], ssm, D=skip, backend=self.backend)
        B = self.B[0] if config.use_b else None
        transforms = (config.dt_transform, config.real_transform, config.imag_transform)
        factors = step_factors(
            self.inv_dt, self.A_real, self.A_imag, B, self.C[0], *transforms, -1, config.disc, config.bandlimit
        )
        y: Tensor = factored_step(x, None, None, *factors, skip, ssm)
        return y

    def empty_state(self, batch_size: int, capacity: int | None, device: torch.device, dtype: torch.dtype) -> S4dState:
        """Zeros. The state does not grow, so `capacity` needs no room."""
        config = self.config
        sizes = (batch_size, config.d_model, config.pairs) + (() if config.real else (2,))
        return S4dState(torch.zeros(sizes, device=device, dtype=accumulation_dtype(dtype)))

    def kernel(self, length: int) -> Tensor:
        """Taps of every kernel, float64 [kernels,D,length]."""
        return lti_kernel(*self._modes(), length)

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        """FLOPs of the output map and of the scan; on a GPU the kernel ahead is a scan of its own."""
        config = self.config
        width, directions = config.channels * config.d_model, 1 if config.causal else 2
        if self.D.is_cuda and dtype != torch.float64 and self.capabilities.backends[0].name == "triton":
            mixing = directions * lti_flops(batch_size, length, width, config.pairs)
        else:
            mixing = lti_flops(batch_size, length, width, config.pairs, directions=directions)
        state = config.d_model * config.d_state
        return self._cost(batch_size, length, dtype, mixing, state)

    def _modes(self) -> tuple[Tensor, Tensor]:
        """log A' [D,N/2,2] and C B' [kernels,D,N/2,2], in float64."""
        config = self.config
        dt, a = self._systems()
        C = self._complex(self.C)
        if config.bandlimit is not None:
            C = C * ((dt * a.imag.abs()) / (2 * math.pi) < config.bandlimit / 2)
        B = shared(self._complex(self.B)[0], config.d_model, 0) if config.use_b else torch.ones_like(a)
        log_a, weight = discretise(dt, a, B, config.disc)
        return torch.view_as_real(log_a), torch.view_as_real(C * weight)

    def _complex(self, parameter: Tensor) -> Tensor:
        """B or C as complex128, whatever the modes are."""
        wide = parameter.double()
        return torch.complex(wide, torch.zeros_like(wide)) if self.config.real else complex_of(wide)

    def _as_pairs(self, ssm: Tensor) -> Tensor:
        """The state as [B,D,N/2,2], whatever the modes are."""
        return torch.stack([ssm, torch.zeros_like(ssm)], -1) if self.config.real else ssm

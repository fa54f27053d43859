"""The H3 layer: keys through a shift SSM, their products with the values through a diagonal SSM, queries as a gate."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from zoo.ops.in_place import kernel_steps, may_overwrite, steps_in_place
from zoo.ops.lti.system import factored_step, step_factors
from zoo.ops.lti_attention import flops as plain_flops
from zoo.ops.lti_attention import kernel_flops, lti_attention
from zoo.ops.lti_attention.factors import kernel_taps, times, toeplitz
from zoo.ops.lti_attention.step import lti_attention_step
from zoo.ops.short_convolution.shift import shift_taps as step_taps
from zoo.ops.short_convolution.step import convolve_next

from sequence_mixer import Cost, MatrixForm, SequenceMixer, State
from sequence_mixer.mixer import Factors
from sequence_mixer.shapes import accumulation_dtype
from zoo_h3.config import H3Config, capabilities_of
from zoo_h3.ssm import discretize, initial_modes, inverse_transform, shift_taps, transform

STEP = "short_convolution_step"
SHIFT_BACKENDS = {"fft": "chunked"}  # so few taps are multiplied one by one under every backend but Triton


class H3State(State):
    """What the layer carries from one piece of a sequence to the next.

    shift: [B,D,W-1], the last keys, oldest first, in the activation dtype.
    ssm: [B,H,M,2,P,P], modes (re, im) of sums of k v^T, in the accumulation dtype.
    """

    shift: Tensor
    ssm: Tensor


class H3Mixer(SequenceMixer):
    """y = out_proj(q^T SSM_diag(SSM_shift(k) v^T)), [B,T,D] -> [B,T,D], head by head.

    Parameters, with S = n_ssm, M = N/2 modes, complex ones as (re, im): in_proj [3 D,D], rows of queries, keys, values;
    shift_B, shift_C [D,W] and shift_D [D]; log_dt [H]; A_real [S,M], -Re A before `real_transform`; A_imag [S,M];
    B [S,M,2]; C [H,M,2]; D [H]; out_proj [D,D], columns in (head, channel) order.
    """

    config: H3Config
    state_type = H3State

    def __init__(self, config: H3Config) -> None:
        super().__init__(config, capabilities_of(config))
        width, taps, modes = config.d_model, config.taps, config.modes
        self.in_proj = nn.Linear(width, 3 * width, bias=config.bias)
        self.shift_B = nn.Parameter(torch.zeros(width, taps))
        with torch.no_grad():
            self.shift_B[:, 0] = 1.0
        self.shift_C = nn.Parameter(torch.empty(width, taps).uniform_(-1, 1) / math.sqrt(taps))
        self.shift_D = nn.Parameter(torch.randn(width))
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        self.log_dt = nn.Parameter(low + (high - low) * torch.rand(config.heads))
        rate, turn = initial_modes(config)
        self.A_real = nn.Parameter(inverse_transform(rate, config.real_transform))
        self.A_imag = nn.Parameter(turn)
        self.B = nn.Parameter(torch.stack([torch.ones_like(rate), torch.zeros_like(rate)], -1))
        self.C = nn.Parameter(torch.randn(config.heads, modes, 2) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(config.heads))
        self.out_proj = nn.Linear(width, width, bias=config.bias)

    def mix(
        self,
        x: Tensor,
        state: H3State | None,
        *,
        cu_seqlens: Tensor | None,
        padding_mask: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, H3State]:
        """See `SequenceMixer.mix`."""
        q, k, v, shift = self._inputs(x, None if state is None else state.shift, cu_seqlens, donate)
        if state is not None and self._steps(state, v, cu_seqlens, donate):
            mixed = self._step(q.squeeze(1), k.squeeze(1), v.squeeze(1), state.ssm)
            return self.out_proj(mixed.flatten(1).unsqueeze(1)), H3State(state.shift.copy_(shift), state.ssm)
        log_a, c = self.modes()
        y, ssm = lti_attention(
            q,
            k,
            v,
            log_a,
            c,
            D=self.D,
            initial_state=None if state is None else state.ssm,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        after = H3State(shift, ssm)
        if donate and state is not None and may_overwrite(state.shift, state.ssm):
            after = H3State(state.shift.copy_(shift), state.ssm.copy_(ssm))
        return self.out_proj(y.flatten(2)), after

    def _steps(self, state: H3State, v: Tensor, cu_seqlens: Tensor | None, donate: bool) -> bool:
        """Whether the state is overwritten by the operator itself; its kernel has heads of one channel."""
        served = self.config.head_dim == 1 or self.backend != "triton"
        return served and steps_in_place(
            "lti_attention_step", self.backend, state.ssm, v, donate=donate, cu_seqlens=cu_seqlens
        )

    def _step(self, q: Tensor, k: Tensor, v: Tensor, ssm: Tensor) -> Tensor:
        """y [B,H,P] of one token's q, k, v [B,H,P]; ssm [B,H,M,2,P,P] is overwritten."""
        config = self.config
        facts = {"P": config.head_dim, "modes": config.modes}
        if not kernel_steps("lti_attention_step", self.backend, v, facts):
            log_a, c = self.modes()
            return lti_attention_step(q, k, v, log_a, c, ssm, D=self.D, backend=self.backend)
        transforms = ("exp", config.real_transform, "none")
        factors = step_factors(self.log_dt, self.A_real, self.A_imag, self.B, self.C, *transforms, 1, config.disc, None)
        values, keys, queries = (part.squeeze(2) for part in (v, k, q))
        y: Tensor = factored_step(values, keys, queries, *factors, self.D, ssm[..., 0, 0])
        return y.unsqueeze(2)

    def empty_state(self, batch_size: int, capacity: int | None, device: torch.device, dtype: torch.dtype) -> H3State:
        """Zeros. The state does not grow, so `capacity` needs no room."""
        config = self.config
        shift = torch.zeros(batch_size, config.d_model, config.taps - 1, device=device, dtype=dtype)
        sizes = (batch_size, config.heads, config.modes, 2, config.head_dim, config.head_dim)
        return H3State(shift, torch.zeros(sizes, device=device, dtype=accumulation_dtype(dtype)))

    def matrix_form(self, x: Tensor) -> MatrixForm:
        """M^h_ij = (K^h_{i-j} + D_h d_ij) <q_i, k_j>, k after the shift SSM: a Toeplitz mask, a product of rank P."""
        self._check_call(x, None, None)
        q, k, v, _ = self._inputs(x, None, None)
        inner = accumulation_dtype(v.dtype)
        left, right = q.to(inner), k.to(inner)
        log_a, c = self.modes()
        skip = self.D.to(inner) * (left * right).sum(-1)  # [B,T,H]

        def mask(heads: slice) -> Tensor:
            tile = toeplitz(kernel_taps(log_a[heads], c[heads], x.shape[1]).to(inner))
            return tile.expand(x.shape[0], -1, -1, -1)

        def build(heads: slice) -> Tensor:
            scores = torch.einsum("bthp,bshp->bhts", left[:, :, heads], right[:, :, heads])
            return mask(heads) * scores + torch.diag_embed(skip[:, :, heads].transpose(1, 2))

        def finish(mixed: Tensor) -> Tensor:
            y: Tensor = self.out_proj(mixed.to(v.dtype).flatten(2))
            return y

        return MatrixForm(build, self.config.heads, v, finish, Factors(mask, left, right, skip))

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        """FLOPs of the projections, 8 B T D^2, and of LTI attention on the device of the parameters, since kernels take
        longer chunks; the shift SSM multiplies no matrices."""
        config = self.config
        tokens, width = batch_size * length, config.d_model
        kernels = self.D.is_cuda and dtype != torch.float64 and self.capabilities.backends[0].name == "triton"
        count = kernel_flops if kernels else plain_flops
        mixing = count(batch_size, length, config.heads, config.head_dim, config.modes)
        parameters = sum(parameter.numel() for parameter in self.parameters())
        row = width * (config.taps - 1) + width * config.head_dim * config.d_state
        return Cost(
            flops=8 * tokens * width * width + mixing,
            bytes=dtype.itemsize * (parameters + 2 * tokens * width),
            parameters=parameters,
            state_elements=batch_size * row,
        )

    def parameter_groups(self) -> Mapping[str, dict[str, float]]:
        """No weight decay, and `ssm_lr_scale`, on time steps, A and B of both SSMs, as in the reference."""
        names = ("log_dt", "A_real", "A_imag", "B", "shift_B")
        return {name: {"weight_decay": 0.0, "lr_scale": self.config.ssm_lr_scale} for name in names}

    def modes(self) -> tuple[Tensor, Tensor]:
        """log Abar and C Bbar of every head, float64 pairs [H,M,2]: float32 would lose the phase of slow modes."""
        config = self.config
        step = self.log_dt.double().exp().unsqueeze(1)  # [H,1]
        copies = config.heads // config.ssms
        rate = transform(self.A_real.double(), config.real_transform).repeat(copies, 1)
        turn = self.A_imag.double().repeat(copies, 1)
        log_a, factor = discretize(rate, turn, step, config.disc)
        weight = times(self.C.double(), self.B.double().repeat(copies, 1, 1))
        return log_a, times(weight, factor)

    def _inputs(
        self, x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, donate: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k after the shift SSM, v [B,T,H,P], and the last keys before it [B,D,W-1]."""
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        backend = SHIFT_BACKENDS.get(self.backend, self.backend)
        if (
            past is not None
            and steps_in_place(STEP, backend, past, k, donate=donate, cu_seqlens=cu_seqlens, dtype=k.dtype)
            and kernel_steps(STEP, backend, k, {"width": self.config.taps})
        ):
            taps = step_taps(self.shift_B, self.shift_C, self.shift_D)
        else:
            inner = accumulation_dtype(k.dtype)
            taps = shift_taps(self.shift_B.to(inner), self.shift_C.to(inner), self.shift_D.to(inner)).flip(1)
        shifted, shift = convolve_next(k, taps, None, past, cu_seqlens=cu_seqlens, donate=donate, backend=backend)
        heads = (self.config.heads, self.config.head_dim)
        return q.unflatten(2, heads), shifted.unflatten(2, heads), v.unflatten(2, heads), shift

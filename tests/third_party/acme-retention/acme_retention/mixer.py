"""Retention on the shared linear attention operator."""

import math

import torch
from torch import Tensor, nn
from zoo.ops.linear_attention import flops as linear_attention_flops
from zoo.ops.linear_attention import linear_attention

from acme_retention import RetentionConfig
from sequence_mixer import Capabilities, Cost, MatrixForm, SequenceMixer, State
from sequence_mixer.mixer import Factors
from sequence_mixer.shapes import accumulation_dtype


class RetentionState(State):
    sums: Tensor  # [B,H,N,P], accumulation dtype


class RetentionMixer(SequenceMixer):
    """y_t = q_t^T sum_{j<=t} g_h^(t-j) k_j v_j^T / sqrt(N), heads concatenated and projected."""

    config: RetentionConfig
    state_type = RetentionState

    def __init__(self, config: RetentionConfig, capabilities: Capabilities) -> None:
        super().__init__(config, capabilities)
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.width = config.d_model // config.n_heads

    def empty_state(self, batch_size: int, capacity: int | None, device: torch.device, dtype: torch.dtype) -> State:
        shape = (batch_size, self.config.n_heads, self.width, self.width)
        return RetentionState(torch.zeros(shape, device=device, dtype=accumulation_dtype(dtype)))

    def mix(
        self, x: Tensor, state: RetentionState | None, *, cu_seqlens: Tensor | None, padding_mask: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, RetentionState]:  # fmt: skip
        q, k, v = self._heads(x)
        y, sums = linear_attention(
            q, k, v, log_decay=self._log_decay(x), scale=self.width**-0.5, cu_seqlens=cu_seqlens,
            initial_state=None if state is None else state.sums, backend=self.backend,
        )  # fmt: skip
        return self.out(y.flatten(2)), RetentionState(sums)

    def matrix_form(self, x: Tensor) -> MatrixForm:
        q, k, v = self._heads(x)
        q = q * self.width**-0.5
        log_decay = self._log_decay(x)[0, 0]
        gap = torch.arange(x.shape[1], device=x.device)
        gap = gap[:, None] - gap[None, :]

        def mask(heads: slice) -> Tensor:
            power = gap.clamp_min(0) * log_decay[heads, None, None]
            return torch.where(gap >= 0, power.exp(), 0.0).expand(x.shape[0], -1, -1, -1)

        def build(heads: slice) -> Tensor:
            return mask(heads) * torch.einsum("bthn,bshn->bhts", q[:, :, heads], k[:, :, heads])

        return MatrixForm(
            build, self.config.n_heads, v, lambda mixed: self.out(mixed.to(x.dtype).flatten(2)), Factors(mask, q, k)
        )

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        d_model, heads = self.config.d_model, self.config.n_heads
        parameters = 4 * d_model * d_model
        mixing = linear_attention_flops(batch_size, length, heads, self.width, self.width)
        elements = parameters + 2 * batch_size * length * d_model
        flops = 2 * batch_size * length * parameters + mixing
        return Cost(flops, elements * dtype.itemsize, parameters, batch_size * d_model * self.width)

    def _heads(self, x: Tensor) -> list[Tensor]:
        return [part.unflatten(2, (self.config.n_heads, self.width)) for part in self.qkv(x).chunk(3, dim=2)]

    def _log_decay(self, x: Tensor) -> Tensor:
        """[B,T,H], natural log of the decay of each head."""
        decays = [math.log1p(-(2.0 ** (-5 - head))) for head in range(self.config.n_heads)]
        each = torch.tensor(decays, device=x.device, dtype=accumulation_dtype(x.dtype))
        return each.expand(x.shape[0], x.shape[1], -1)

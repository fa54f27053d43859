"""The linear attention layer: one projection to queries, keys and values, the sums, one projection back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo.ops.in_place import may_overwrite, steps_in_place
from zoo.ops.linear_attention import flops as linear_attention_flops
from zoo.ops.linear_attention import linear_attention
from zoo.ops.linear_attention.feature_map import features
from zoo.ops.linear_attention.step import linear_attention_step

from sequence_mixer import Capabilities, Cost, MatrixForm, SequenceMixer, State
from sequence_mixer.mixer import Factors
from sequence_mixer.shapes import accumulation_dtype
from zoo_linear_attention.config import LinearAttentionConfig


class LinearAttentionState(State):
    """Sums over the past: phi(k) v^T, and phi(k) in one more column under `normalize`."""

    sums: Tensor  # [B,H,N,P(+1)], accumulation dtype


class LinearAttentionMixer(SequenceMixer):
    """y_i = W_o concat_h num_i / (den_i + eps), num_i = sum_j w_ij v_j, den_i = sum_j w_ij, w = scale <phi(q), phi(k)>.

    The sums run over j <= i if causal; without `normalize` y_i = W_o concat_h num_i.
    in_proj: Linear(D, 3 H P), rows ordered queries, keys, values. out_proj: Linear(H P, D).
    """

    config: LinearAttentionConfig
    pads_natively = True
    state_type = LinearAttentionState

    def __init__(self, config: LinearAttentionConfig, capabilities: Capabilities) -> None:
        super().__init__(config, capabilities)
        self.heads, self.width = config.heads, config.width
        self.in_proj = nn.Linear(config.d_model, 3 * self.heads * self.width, bias=config.bias)
        self.out_proj = nn.Linear(self.heads * self.width, config.d_model, bias=config.bias)

    def empty_state(
        self, batch_size: int, capacity: int | None, device: torch.device, dtype: torch.dtype
    ) -> LinearAttentionState:
        shape = (batch_size, self.heads, self.width, self.width + self.config.normalize)
        return LinearAttentionState(torch.zeros(shape, device=device, dtype=accumulation_dtype(dtype)))

    def mix(
        self,
        x: Tensor,
        state: LinearAttentionState | None,
        *,
        cu_seqlens: Tensor | None,
        padding_mask: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, LinearAttentionState]:
        if padding_mask is not None:
            x = torch.where(padding_mask.unsqueeze(-1), x, 0)
        q, k, v = self._project(x)
        config = self.config
        if (
            state is not None
            and padding_mask is None
            and steps_in_place(
                "linear_attention_step", self.backend, state.sums, v, donate=donate, cu_seqlens=cu_seqlens
            )
        ):
            token = linear_attention_step(
                q.squeeze(1),
                k.squeeze(1),
                v.squeeze(1),
                state.sums,
                feature_map=config.feature_map,
                normalize=config.normalize,
                eps=config.eps,
                scale=config.scale,
                backend=self.backend,
            )
            return self.out_proj(token.flatten(1).unsqueeze(1)), state
        mixed, sums = linear_attention(
            q,
            k,
            v,
            feature_map=config.feature_map,
            causal=config.causal,
            normalize=config.normalize,
            eps=config.eps,
            scale=config.scale,
            padding_mask=padding_mask,
            initial_state=None if state is None else state.sums,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        if donate and state is not None and may_overwrite(state.sums):
            sums = state.sums.copy_(sums)
        y = self.out_proj(mixed.flatten(2))
        if padding_mask is not None:
            y = torch.where(padding_mask.unsqueeze(-1), y, 0)
        return y, LinearAttentionState(sums)

    def matrix_form(self, x: Tensor) -> MatrixForm:
        """M^h = left right^T, lower triangular if causal, with left = scale phi(q) / (den + eps) and right = phi(k)."""
        self._check_call(x, None, None)
        q, k, v = self._project(x)
        config, tokens = self.config, x.shape[1]
        left, right = features(q, config.feature_map) * config.scale, features(k, config.feature_map)
        if config.normalize:
            total = right.cumsum(1) if config.causal else right.sum(1, keepdim=True)
            left = left / ((left * total).sum(-1, keepdim=True) + config.eps)

        def mask(heads: slice) -> Tensor:
            ones = torch.ones(tokens, tokens, dtype=left.dtype, device=x.device).tril()
            return ones.expand(x.shape[0], len(range(*heads.indices(self.heads))), -1, -1)

        def build(heads: slice) -> Tensor:
            matrix = torch.einsum("bthn,bshn->bhts", left[:, :, heads], right[:, :, heads])
            return matrix.tril() if config.causal else matrix

        return MatrixForm(
            build,
            self.heads,
            v,
            lambda mixed: self.out_proj(mixed.to(v.dtype).flatten(2)),
            Factors(mask, left, right) if config.causal else None,
        )

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        """FLOPs 8 B T D H P and those of the sums, 2 B T H (K N + K P' + 2 N P') in chunks of K = min(64, T) tokens
        if causal, 4 B T H N P' if not; P' = P + 1 under `normalize`."""
        config, d_model, inner = self.config, self.config.d_model, self.heads * self.width
        parameters = 4 * d_model * inner + (3 * inner + d_model if config.bias else 0)
        mixing = linear_attention_flops(
            batch_size, length, self.heads, self.width, self.width, causal=config.causal, normalize=config.normalize
        )
        state = batch_size * inner * (self.width + config.normalize) if config.causal else 0
        return Cost(
            flops=8 * batch_size * length * d_model * inner + mixing,
            bytes=(parameters + 2 * batch_size * length * d_model) * dtype.itemsize,
            parameters=parameters,
            state_elements=state,
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B,T,H,P] of x [B,T,D]."""
        q, k, v = self.in_proj(x).unflatten(2, (3, self.heads, self.width)).unbind(2)
        return q, k, v

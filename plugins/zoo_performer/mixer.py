"""The Performer layer: one projection to queries, keys and values, FAVOR+ attention, one projection back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo.ops.favor_attention import draw_projection, favor_attention
from zoo.ops.favor_attention import flops as favor_flops
from zoo.ops.favor_attention.matrix import mixing_matrix

from sequence_mixer import Capabilities, Cost, MatrixForm, SequenceMixer, State
from sequence_mixer.shapes import accumulation_dtype
from zoo_performer.config import PerformerConfig


class PerformerState(State):
    """Sums over the past for every feature: of features times values, of features, and their running maximum."""

    sums: Tensor  # [B,H,M,P+2], accumulation dtype; the last column is the logarithm of the scale of the others


class PerformerMixer(SequenceMixer):
    """y_i = W_o concat_h sum_j w_ij v_j / (sum_j w_ij + eps), w_ij = <phi(q_i), phi(k_j)>, over j <= i if causal.

    in_proj: Linear(D, (H + 2 G) P), rows ordered queries, keys, values. out_proj: Linear(H P, D).
    projection: buffer [n_features, P], the random projection of all heads; `after_step` draws it anew.
    """

    config: PerformerConfig
    projection: Tensor
    pads_natively = True
    state_type = PerformerState

    def __init__(self, config: PerformerConfig, capabilities: Capabilities) -> None:
        super().__init__(config, capabilities)
        self.heads, self.kv_heads, self.width = config.heads, config.kv_heads, config.width
        out_bias = config.bias if config.out_bias is None else config.out_bias
        self.in_proj = nn.Linear(config.d_model, (self.heads + 2 * self.kv_heads) * self.width, bias=config.bias)
        self.out_proj = nn.Linear(self.heads * self.width, config.d_model, bias=out_bias)
        self.register_buffer("projection", self.draw(None).to(self.in_proj.weight))

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """A random projection [n_features, P]; from torch's global source of random numbers if generator is None."""
        config = self.config
        return draw_projection(
            config.n_features,
            self.width,
            orthogonal=config.orthogonal,
            norms=config.projection_norms,
            generator=generator,
        )

    @torch.no_grad()
    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Draw the projection anew, from `generator`, if `step` (counted from 1) is a multiple of redraw_interval."""
        interval = self.config.redraw_interval
        if interval is not None and step > 0 and step % interval == 0:
            self.projection.copy_(self.draw(generator))

    def empty_state(
        self, batch_size: int, capacity: int | None, device: torch.device, dtype: torch.dtype
    ) -> PerformerState:
        inner = accumulation_dtype(dtype)
        shape = (batch_size, self.heads, self.config.features, self.width)
        sums = torch.zeros(shape, device=device, dtype=inner)
        started = self.config.key_eps > 0  # then the sums have a scale, 1, before the first key
        columns = sums.new_tensor([self.config.key_eps, 0.0 if started else torch.finfo(inner).min])
        return PerformerState(torch.cat([sums, columns.expand(*shape[:3], 2)], -1))

    def mix(
        self,
        x: Tensor,
        state: PerformerState | None,
        *,
        cu_seqlens: Tensor | None,
        padding_mask: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, PerformerState]:
        if padding_mask is not None:
            x = torch.where(padding_mask.unsqueeze(-1), x, 0)
        config = self.config
        if state is None and config.key_eps > 0:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
            state = self.empty_state(sequences, None, x.device, x.dtype)
        q, k, v = self._project(x)
        mixed, sums = favor_attention(
            q,
            k,
            v,
            self.projection,
            features=config.feature_map,
            causal=config.causal,
            eps=config.eps,
            feature_eps=config.feature_eps,
            compat=config.compat,
            padding_mask=padding_mask,
            initial_state=None if state is None else state.sums,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        y = self.out_proj(mixed.flatten(2))
        if padding_mask is not None:
            y = torch.where(padding_mask.unsqueeze(-1), y, 0)
        return y, PerformerState(sums)

    def matrix_form(self, x: Tensor) -> MatrixForm:
        """M^h_ij = w_ij / (sum_j w_ij + eps), lower triangular if causal."""
        self._check_call(x, None, None)
        q, k, v = self._project(x)
        config, group = self.config, self.heads // self.kv_heads

        def build(heads: slice) -> Tensor:
            return mixing_matrix(
                q[:, :, heads],
                k.repeat_interleave(group, 2)[:, :, heads],
                self.projection,
                features=config.feature_map,
                causal=config.causal,
                eps=config.eps,
                feature_eps=config.added_to_features,
                compat=config.compat,
                key_eps=config.key_eps,
            )

        return MatrixForm(
            build,
            self.heads,
            v.repeat_interleave(group, 2),
            lambda mixed: self.out_proj(mixed.to(v.dtype).flatten(2)),
        )

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        """FLOPs 4 B T D (H + G) P and those of the operator: features, sums, products inside chunks if causal."""
        config, d_model = self.config, self.config.d_model
        rows, inner = self.in_proj.out_features, self.heads * self.width
        parameters = sum(parameter.numel() for parameter in self.parameters())
        mixing = favor_flops(
            batch_size, length, self.heads, self.kv_heads, self.width, self.width, config.n_features,
            features=config.feature_map, causal=config.causal,
        )  # fmt: skip
        state = batch_size * self.heads * config.features * (self.width + 2) if config.causal else 0
        return Cost(
            flops=2 * batch_size * length * d_model * (rows + inner) + mixing,
            bytes=(parameters + 2 * batch_size * length * d_model) * dtype.itemsize,
            parameters=parameters,
            state_elements=state,
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B,T,H,P], k and v [B,T,G,P] of x [B,T,D]."""
        parts = self.in_proj(x).unflatten(2, (self.heads + 2 * self.kv_heads, self.width))
        q, k, v = parts.split([self.heads, self.kv_heads, self.kv_heads], 2)
        return q, k, v

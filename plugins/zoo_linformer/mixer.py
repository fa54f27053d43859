"""The Linformer layer: one projection in, keys and values shortened along the length, attention, one projection out."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from zoo.ops.alignment import RealFirst
from zoo.ops.linformer_attention import flops as linformer_flops
from zoo.ops.linformer_attention import linformer_attention
from zoo.ops.softmax_attention import flops as attention_flops
from zoo.ops.softmax_attention import softmax_attention

from sequence_mixer import Capabilities, Cost, MatrixForm, SequenceMixer
from zoo_linformer.config import LinformerConfig
from zoo_linformer.matrix import mixing_matrix
from zoo_linformer.windows import convolve, max_pool, mean_pool, real_slots, windows_of


class LinformerMixer(SequenceMixer):
    """y_i = W_o concat_h sum_r softmax_r(P^-1/2 <q_i^h, K_r^g>) V_r^g with K = E k, V = F v and g = h // (H/G).

    in_proj: Linear(D, (H + 2G) P), rows ordered queries, keys, values; no rows of values under `tie_values`.
    out_proj: Linear(H P, D). proj_k, proj_v: E^T and F^T, [max_length, R] (convolution: taps [W]), with an axis of G
    heads in front under share "none"; no proj_v under "kv" and "layerwise", where E = F, and none at all for pooling.
    """

    config: LinformerConfig
    pads_natively = True

    def __init__(
        self, config: LinformerConfig, capabilities: Capabilities, shared: MutableMapping[str, Any] | None = None
    ) -> None:
        """shared: one mapping for all layers of a net; layers of one size under share "layerwise" find E there."""
        super().__init__(config, capabilities)
        self.heads, self.groups, self.width = config.heads, config.kv_heads, config.width
        self.parts = [self.heads, self.groups, 0 if config.tie_values else self.groups]
        self.in_proj = nn.Linear(config.d_model, sum(self.parts) * self.width, bias=config.bias)
        self.out_proj = nn.Linear(self.heads * self.width, config.d_model, bias=config.out_bias)
        self.proj_k: nn.Parameter | None = None
        self.proj_v: nn.Parameter | None = None
        if config.learned:
            self.proj_k = self._length_projection({} if shared is None else shared)
            if config.sharing in ("none", "headwise"):
                self.proj_v = self._new_projection()

    def mix(
        self, x: Tensor, state: None, *, cu_seqlens: Tensor | None, padding_mask: Tensor | None, donate: bool
    ) -> tuple[Tensor, None]:
        if padding_mask is not None:
            x = torch.where(padding_mask.unsqueeze(-1), x, 0)
        q, k, v = self._project(x)
        if self.config.projection == "linear":
            E, F = self._length_matrices()
            mixed = linformer_attention(q, k, v, E, F, padding_mask=padding_mask, backend=self.backend)
        else:
            mixed = self._attend_to_windows(q, k, v, padding_mask)
        y = self.out_proj(mixed.flatten(2))
        return y if padding_mask is None else torch.where(padding_mask.unsqueeze(-1), y, 0), None

    def matrix_form(self, x: Tensor) -> MatrixForm:
        """M^h = softmax(P^-1/2 q (E k)^T) F, of rank R; under max_pool one matrix per channel, where F picks tokens."""
        self._check_call(x, None, None)
        q, k, v = self._project(x)
        matrices: Tensor | None
        if self.config.projection == "linear":
            E, F = (matrix[..., : x.shape[1]].expand(self.groups, -1, -1) for matrix in self._length_matrices())
            keys, matrices = torch.einsum("grt,btgp->brgp", E.to(k.dtype), k), F
        else:
            keys, _ = self._pool(k, v, self._all_real(x))
            matrices = None if self.config.projection == "max_pool" else self._window_matrix(x.shape[1], v)
        window = self.config.window if matrices is None else None
        return mixing_matrix(q, keys, v, matrices, window, lambda mixed: self.out_proj(mixed.to(q.dtype).flatten(2)))

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        """FLOPs 2 B T D P (columns of both projections) + 4 B T R P (G + H); windows: their number for R, and for a
        convolution 2 B T G P taps for keys and values each in place of 4 B T R P G."""
        config, d_model, inner = self.config, self.config.d_model, self.heads * self.width
        columns = sum(self.parts) * self.width
        parameters = d_model * (columns + inner) + columns * config.bias + d_model * config.out_bias
        parameters += sum(each.numel() for each in (self.proj_k, self.proj_v) if each is not None)
        if config.projection == "linear":
            sizes = (batch_size, length, self.heads, self.groups, self.width, config.projected)
            mixing = linformer_flops(*sizes)
        else:
            keys = -(-length // config.window)
            mixing = attention_flops(batch_size, length, keys, self.heads, self.width)
            if config.projection == "convolution":
                mixing += 4 * batch_size * keys * config.window * self.groups * self.width
        return Cost(
            flops=2 * batch_size * length * d_model * (columns + inner) + mixing,
            bytes=(parameters + 2 * batch_size * length * d_model) * dtype.itemsize,
            parameters=parameters,
            state_elements=0,
        )

    def _new_projection(self) -> nn.Parameter:
        """E^T [max_length,R] from U(+-R^-1/2), or taps [W] from U(+-W^-1/2); [G,...] under share "none"."""
        config = self.config
        shape = (config.max_length, config.projected) if config.projection == "linear" else (config.window,)
        bound = shape[-1] ** -0.5
        if config.sharing == "none":
            shape = (self.groups, *shape)
        return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

    def _length_projection(self, shared: MutableMapping[str, Any]) -> nn.Parameter:
        if self.config.sharing != "layerwise":
            return self._new_projection()
        size = (self.config.max_length, self.config.projected, self.config.window)
        key = f"linformer {self.config.projection} {size}"
        if key not in shared:
            shared[key] = self._new_projection()
        parameter: nn.Parameter = shared[key]
        return parameter

    def _length_matrices(self) -> tuple[Tensor, Tensor]:
        """E and F, [R,max_length] or [G,R,max_length]."""
        assert self.proj_k is not None
        E = self.proj_k.mT
        return E, E if self.proj_v is None else self.proj_v.mT

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B,T,H,P], k and v [B,T,G,P] of x [B,T,D]."""
        q, k, v = self.in_proj(x).unflatten(2, (-1, self.width)).split(self.parts, 2)
        return q, k, k if self.config.tie_values else v

    def _attend_to_windows(self, q: Tensor, k: Tensor, v: Tensor, padding_mask: Tensor | None) -> Tensor:
        aligned = None if padding_mask is None else RealFirst(padding_mask)
        if aligned is not None:
            q, k, v = aligned.turn(q), aligned.turn(k), aligned.turn(v)
        real = self._all_real(k) if aligned is None else real_slots(aligned.lengths, k.shape[1], self.config.window)
        keys, values = self._pool(k, v, real)
        seen = None if aligned is None else real.any(2)
        mixed = softmax_attention(q, keys, values, causal=False, padding_mask=seen, backend=self.backend)
        return mixed if aligned is None else aligned.turn_back(mixed)

    def _pool(self, k: Tensor, v: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [B,T,G,P] window by window, [B,R,G,P]; real: bool [B,R,W]."""
        keys, values = windows_of(k, self.config.window), windows_of(v, self.config.window)
        if self.config.projection == "convolution":
            assert self.proj_k is not None
            other = self.proj_k if self.proj_v is None else self.proj_v
            return convolve(keys, self.proj_k.to(k.dtype)), convolve(values, other.to(v.dtype))
        pool = mean_pool if self.config.projection == "mean_pool" else max_pool
        return pool(keys, real), pool(values, real)

    def _all_real(self, x: Tensor) -> Tensor:
        """Slots of windows that hold tokens of x [B,T,...], bool [B,R,W]."""
        lengths = torch.full((x.shape[0],), x.shape[1], device=x.device)
        return real_slots(lengths, x.shape[1], self.config.window)

    def _window_matrix(self, tokens: int, like: Tensor) -> Tensor:
        """The values' projection of means or taps as matrices [G,R,T]: what it does to the unit vectors."""
        units = torch.eye(tokens, dtype=like.dtype, device=like.device)[None, :, None].expand(-1, -1, self.groups, -1)
        return self._pool(units, units, self._all_real(units))[1][0].transpose(0, 1)

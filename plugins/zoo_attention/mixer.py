"""The attention layer: one projection to queries, keys and values, rotary positions, attention, one projection back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo.ops.softmax_attention import flops as attention_flops
from zoo.ops.softmax_attention import softmax_attention

from sequence_mixer import Capabilities, Cost, MatrixForm, PaddingAsPacking, SequenceMixer, State
from sequence_mixer.kv_buffer import append, empty, valid_mask
from sequence_mixer.shapes import accumulation_dtype
from zoo_attention.config import AttentionConfig
from zoo_attention.rope import rotate


class AttentionState(State):
    """Keys (already turned) and values of the past, in buffers with spare room; see `sequence_mixer.kv_buffer`."""

    keys: Tensor  # [B,K,G,P], activation dtype
    values: Tensor  # [B,K,G,P], activation dtype
    positions: Tensor  # int64 [B], real tokens so far


class AttentionMixer(SequenceMixer):
    """y_i = W_o concat_h sum_j softmax_j(scale <q_i^h, k_j^g>) v_j^g with g = h // (H/G), over j <= i if causal.

    in_proj: Linear(D, (H + 2G) P), rows ordered queries, keys, values. out_proj: Linear(H P, D).
    """

    config: AttentionConfig
    pads_natively = True
    state_type = AttentionState

    def __init__(self, config: AttentionConfig, capabilities: Capabilities) -> None:
        super().__init__(config, capabilities)
        self.heads, self.groups, self.width = config.heads, config.kv_heads, config.width
        self.scale = self.width**-0.5 if config.scale is None else config.scale
        self.in_proj = nn.Linear(config.d_model, (self.heads + 2 * self.groups) * self.width, bias=config.bias)
        self.out_proj = nn.Linear(self.heads * self.width, config.d_model, bias=config.bias)

    def empty_state(
        self, batch_size: int, capacity: int | None, device: torch.device, dtype: torch.dtype
    ) -> AttentionState:
        shape = (self.groups, self.width)
        (keys, values), positions = empty(
            batch_size, (shape, shape), capacity=capacity or 0, dtype=dtype, device=device
        )
        return AttentionState(keys, values, positions)

    def mix(
        self,
        x: Tensor,
        state: AttentionState | None,
        *,
        cu_seqlens: Tensor | None,
        padding_mask: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, AttentionState | None]:
        if padding_mask is not None:
            x = torch.where(padding_mask.unsqueeze(-1), x, 0)
        past = None
        if state is not None:  # a donated state's own positions are about to change
            past = state.positions.clone() if donate else state.positions
        q, k, v = self._project(x, past, cu_seqlens, padding_mask)
        if state is None or past is None:
            mixed, after = self._attend(q, k, v, padding_mask=padding_mask, cu_seqlens=cu_seqlens), None
        else:
            mixed, after = self._attend_to_past(q, k, v, state, past, cu_seqlens, padding_mask, donate)
        y = self.out_proj(mixed.to(q.dtype).flatten(2))
        return y if padding_mask is None else torch.where(padding_mask.unsqueeze(-1), y, 0), after

    def matrix_form(self, x: Tensor) -> MatrixForm:
        """M^h = softmax over the keys that are seen, [B,H,T,T]; values are those of the head's group."""
        self._check_call(x, None, None)
        q, k, v = self._project(x, None, None, None)
        each, tokens = self.heads // self.groups, x.shape[1]
        k, v = k.repeat_interleave(each, 2), v.repeat_interleave(each, 2)
        wide = accumulation_dtype(q.dtype)

        def build(heads: slice) -> Tensor:
            logits = torch.einsum("bthp,bshp->bhts", q[:, :, heads].to(wide), k[:, :, heads].to(wide)) * self.scale
            if self.config.causal:
                future = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
                logits = logits.masked_fill(future, -torch.inf)
            return logits.softmax(-1)

        return MatrixForm(build, self.heads, v, lambda mixed: self.out_proj(mixed.to(q.dtype).flatten(2)))

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        """FLOPs 2 B T D (2H + 2G) P + 4 B H T^2 P: the whole matrix is counted, causal or not, as torch counts it."""
        d_model, config = self.config.d_model, self.config
        columns = 2 * (self.heads + self.groups) * self.width
        biases = (self.heads + 2 * self.groups) * self.width + d_model if config.bias else 0
        parameters = d_model * columns + biases
        mixing = attention_flops(batch_size, length, length, self.heads, self.width)
        state = batch_size * (2 * length * self.groups * self.width + 1) if config.causal else 0  # + positions
        return Cost(
            flops=2 * batch_size * length * d_model * columns + mixing,
            bytes=(parameters + 2 * batch_size * length * d_model) * dtype.itemsize,
            parameters=parameters,
            state_elements=state,
        )

    def _project(
        self, x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B,T,H,P], k and v [B,T,G,P] of x [B,T,D], q and k turned to their positions."""
        heads = self.in_proj(x).unflatten(2, (-1, self.width))
        turned, v = heads.split([self.heads + self.groups, self.groups], 2)
        if self.config.rope != "none":
            positions = token_positions(x, past, cu_seqlens, padding_mask)
            turned = rotate(turned, positions, pairing=self.config.rope, base=self.config.rope_base)
        q, k = turned.split([self.heads, self.groups], 2)
        return q, k, v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        seen: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> Tensor:
        """seen: bool, broadcastable to [B,H,Tq,Tk], in place of the order of tokens."""
        return softmax_attention(
            q,
            k,
            v,
            causal=self.config.causal and seen is None,
            scale=self.scale,
            bias=seen,
            padding_mask=padding_mask,
            cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            backend=self.backend,
        )

    def _attend_to_past(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: AttentionState,
        past: Tensor,
        cu_seqlens: Tensor | None,
        padding_mask: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, AttentionState]:
        """Append the new tokens and attend to all; past: int64 [B], tokens of each row before them."""
        kind, tokens = state.keys.dtype, q.shape[1]
        lengths = starts = None
        if padding_mask is not None:
            lengths, starts = padding_mask.sum(1), padding_mask.to(torch.int32).argmax(1)
        after = append(
            (state.keys, state.values),
            state.positions,
            (k.to(kind), v.to(kind)),
            lengths,
            new_starts=starts,
            cu_seqlens=cu_seqlens,
            donate=donate,
        )
        q, (keys, values) = q.to(kind), after.buffers
        new_state = AttentionState(keys, values, after.positions)
        if after.filled is not None:
            keys, values = keys[:, : after.filled], values[:, : after.filled]
        if after.uniform:
            mixed = self._attend(q, keys, values)
        elif cu_seqlens is not None:
            mixed = self._attend_rows(q, cu_seqlens, keys, values, after.positions)
        elif self.backend == "triton":  # its kernels take spans of keys, and no mask
            packing = PaddingAsPacking(
                torch.ones_like(q[..., 0, 0], dtype=torch.bool) if padding_mask is None else padding_mask
            )
            mixed = self._attend_rows(packing.pack(q), packing.cu_seqlens[:-1], keys, values, after.positions)
            mixed = packing.unpack(mixed)
        else:
            mixed = self._attend(q, keys, values, seen=valid_mask(past, keys.shape[1], tokens, new_starts=starts))
        return mixed, new_state

    def _attend_rows(self, q: Tensor, cu_seqlens: Tensor, keys: Tensor, values: Tensor, filled: Tensor) -> Tensor:
        """Sequence s of packed queries attends to row s of the buffers.

        q: [1,M,H,P]; queries after the last boundary belong to no sequence, and their result has no meaning.
        cu_seqlens: int [S+1]. keys, values: [S,K,G,P]. filled: int64 [S], valid slots of each row. Returns [1,M,H,P].

        The valid slots of all rows are packed one after the other; the others follow as one more sequence, so that
        shapes do not depend on values.
        """
        slots = keys.shape[1]
        spare = torch.arange(slots, device=keys.device) >= filled.unsqueeze(1)
        order = torch.argsort(spare.flatten().to(torch.int32), stable=True)
        k, v = (buffer.flatten(0, 1).index_select(0, order).unsqueeze(0) for buffer in (keys, values))
        ends = filled.cumsum(0)
        zero = ends.new_zeros(1)
        return self._attend(
            q,
            k,
            v,
            cu_seqlens=torch.cat([cu_seqlens.to(torch.int64), zero + q.shape[1]]),
            cu_seqlens_k=torch.cat([zero, ends, zero + order.shape[0]]),
        )


def token_positions(x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, padding_mask: Tensor | None) -> Tensor:
    """Position of each token of x [B,T,D] in its sequence, from 0, counting real tokens: int64 [T] or [B,T].

    past: int64 [B] (or [S]), tokens that came before; None for none. Padded slots get some valid position.
    """
    index = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is not None:
        ends = cu_seqlens.to(torch.int64)
        sequence = torch.searchsorted(ends[1:], index, right=True).clamp(max=ends.shape[0] - 2)
        own = index - ends[sequence]
        return own if past is None else own + past[sequence]
    if padding_mask is not None:
        index = (padding_mask.cumsum(1) - 1).clamp(min=0)
    return index if past is None else index + past.unsqueeze(1)

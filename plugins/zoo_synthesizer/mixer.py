"""The synthesizer layer: values from the input, logits from its parts, attention, one projection back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo.ops.random_attention import flops as random_flops
from zoo.ops.random_attention import random_attention
from zoo.ops.softmax_attention import softmax_attention
from zoo.ops.synthetic_attention import flops as synthetic_flops
from zoo.ops.synthetic_attention import synthetic_attention

from sequence_mixer import Capabilities, Cost, MatrixForm, SequenceMixer, State
from sequence_mixer.errors import LengthError
from sequence_mixer.kv_buffer import Appended, append, empty, valid_mask
from sequence_mixer.shapes import accumulation_dtype, checks_values
from zoo_synthesizer.config import SynthesizerConfig
from zoo_synthesizer.logits import Logits, MixedLogits
from zoo_synthesizer.parts import Positions
from zoo_synthesizer.segments import Segments, packed_segments, padded_segments

WITHOUT_DECAY = (".alpha_logits", ".table", ".r1", ".r2", ".b1", ".b2")


class ValueState(State):
    """Values of the past, in a buffer with spare room; see `sequence_mixer.kv_buffer`."""

    values: Tensor  # [B,K,H,P], activation dtype
    positions: Tensor  # int64 [B], real tokens so far


class KeyValueState(State):
    """The same with keys, which the part `vanilla` compares queries to."""

    keys: Tensor  # [B,K,H,P], activation dtype
    values: Tensor  # [B,K,H,P], activation dtype
    positions: Tensor  # int64 [B], real tokens so far


SynthesizerState = ValueState | KeyValueState


class SynthesizerMixer(SequenceMixer):
    """y_i = W_o concat_h sum_j softmax_j(R^h_ij) v_j^h, over j <= i if causal, with the logits R of `logits`.

    v_proj: Linear(D, H P). out_proj: Linear(H P, D). logits: what each part has learned, by the name of the part.
    """

    config: SynthesizerConfig
    pads_natively = True

    def __init__(self, config: SynthesizerConfig, capabilities: Capabilities) -> None:
        super().__init__(config, capabilities)
        self.heads, self.width = config.heads, config.width
        self.v_proj = nn.Linear(config.d_model, self.heads * self.width, bias=config.bias)
        self.out_proj = nn.Linear(self.heads * self.width, config.d_model, bias=config.bias)
        self.logits = MixedLogits(config)
        self.state_type = KeyValueState if self._kept == 2 else ValueState

    def empty_state(
        self, batch_size: int, capacity: int | None, device: torch.device, dtype: torch.dtype
    ) -> SynthesizerState:
        shapes = ((self.heads, self.width),) * self._kept
        buffers, positions = empty(batch_size, shapes, capacity=capacity or 0, dtype=dtype, device=device)
        return _as_state(buffers, positions)

    def mix(
        self,
        x: Tensor,
        state: SynthesizerState | None,
        *,
        cu_seqlens: Tensor | None,
        padding_mask: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, SynthesizerState | None]:
        if padding_mask is not None:
            x = torch.where(padding_mask.unsqueeze(-1), x, 0)
        segments = None
        if cu_seqlens is not None:
            segments = packed_segments(cu_seqlens)
        elif padding_mask is not None:
            segments = padded_segments(padding_mask)
        after: SynthesizerState | None = None
        if state is None:
            mixed, positions = self._mix_alone(x, segments)
        else:
            mixed, positions, after = self._mix_with_past(x, state, segments, cu_seqlens, padding_mask, donate)
        y: Tensor = self.out_proj(mixed.reshape(*x.shape[:2], -1))
        if isinstance(positions, Tensor) and not checks_values(positions):  # no length could be looked at and refused
            beyond = (positions >= self.config.max_length).reshape(-1, x.shape[1], 1)
            y = torch.where(beyond, torch.nan, y)
        return y if padding_mask is None else torch.where(padding_mask.unsqueeze(-1), y, 0), after

    def logit_matrix(self, x: Tensor, heads: slice = slice(None)) -> Tensor:
        """The mixed logits before masking and softmax, accumulation dtype [B,h,T,T]; x [B,T,D]."""
        self._check_call(x, None, None)
        everywhere = slice(0, x.shape[1])
        operands = self.logits.operands(x, everywhere, everywhere, self.logits.vanilla_keys(x), x.shape[1])
        return operands.whole(heads, x.shape[1], accumulation_dtype(x.dtype)).expand(x.shape[0], -1, -1, -1)

    def matrix_form(self, x: Tensor) -> MatrixForm:
        """M^h = softmax over the keys that are seen, [B,H,T,T]; the same for every row if all parts are random."""

        def build(heads: slice) -> Tensor:
            logits = self.logit_matrix(x, heads)
            if self.config.causal:
                future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
                logits = logits.masked_fill(future, -torch.inf)
            return logits.softmax(-1)

        self._check_call(x, None, None)
        v = self._values(x)
        return MatrixForm(build, self.heads, v, lambda mixed: self.out_proj(mixed.to(v.dtype).flatten(2)))

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        """FLOPs of the projections, of the dense maps, and 2 B H T^2 (N + P) for inner products of N channels in all.

        Whole matrices count, causal or not, but the product of `random` alone, which skips blocks that causality hides.
        """
        config, tokens, heads, width = self.config, batch_size * length, self.heads, self.width
        columns = 2 * heads * width * config.d_model  # multiply-adds per token, here of both projections
        inner = 0
        if "vanilla" in config.parts:
            columns += 2 * heads * width * config.d_model
            inner += width
        if "dense" in config.parts:
            columns += 0 if config.shares_queries else heads * config.hidden * config.d_model
            inner += config.hidden + config.bias
        if "factorised_random" in config.parts:
            inner += config.factor_rank
        if "factorised_dense" in config.parts:
            columns += heads * config.hidden * (2 * config.d_model + sum(config.grid))
        if config.parts == ("random",):
            mixing = random_flops(batch_size, length, length, heads, width, config.causal)
        else:
            mixing = synthetic_flops(batch_size, length, length, heads, inner, width)
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return Cost(
            flops=2 * tokens * columns + mixing,
            bytes=(parameters + 2 * tokens * config.d_model) * dtype.itemsize,
            parameters=parameters,
            state_elements=batch_size * (self._kept * length * heads * width + 1) if config.causal else 0,  # + position
        )

    def parameter_groups(self) -> dict[str, dict[str, float]]:
        """No weight decay on mixture weights, biases and what is learned per position and multiplied by no input."""
        return {name: {"weight_decay": 0.0} for name, _ in self.named_parameters() if name.endswith(WITHOUT_DECAY)}

    @property
    def _kept(self) -> int:
        """Buffers of the state: values, and keys where a part compares tokens."""
        return 2 if "vanilla" in self.config.parts else 1

    def _values(self, x: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,H,P]."""
        raised: Tensor = self.v_proj(x)
        return raised.reshape(*x.shape[:2], self.heads, self.width)

    def _mix_alone(self, x: Tensor, segments: Segments | None) -> tuple[Tensor, Positions]:
        """Whole sequences: [B,T,H,P] or packed [1,B T,H,P], and the position of each token."""
        if segments is None:
            everywhere = slice(0, x.shape[1])
            logits = self.logits.operands(x, everywhere, everywhere, self.logits.vanilla_keys(x), x.shape[1])
            return self._attend(logits, self._values(x), everywhere), everywhere
        x = _as_one_row(x)
        total = x.shape[1]
        positions = segments.positions(total)
        longest = min(total, self.config.max_length)
        logits = self.logits.operands(x, positions, positions, self.logits.vanilla_keys(x), longest)
        return self._attend(logits, self._values(x), positions, cu_seqlens=segments.cu_seqlens), positions

    def _mix_with_past(
        self,
        x: Tensor,
        state: SynthesizerState,
        segments: Segments | None,
        cu_seqlens: Tensor | None,
        padding_mask: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, Positions, SynthesizerState]:
        """Append the new tokens and attend to all; returns as `_mix_alone`, and the state after them."""
        past = state.positions.clone() if donate else state.positions  # a donated state's own are about to change
        buffers = tuple(leaf for name, leaf in state.leaves().items() if name != "positions")
        made = (self.logits.vanilla_keys(x), self._values(x))
        news = tuple(new.to(buffers[0].dtype) for new in made if new is not None)
        lengths = starts = None
        if padding_mask is not None:
            lengths, starts = padding_mask.sum(1), padding_mask.to(torch.int32).argmax(1)
        self._expect_room(past, lengths if cu_seqlens is None else cu_seqlens.diff(), x.shape[1])
        after = append(buffers, state.positions, news, lengths, new_starts=starts, cu_seqlens=cu_seqlens, donate=donate)
        if after.uniform and after.filled is not None and after.filled > self.config.max_length:
            raise self._too_long(after.filled)
        slots = min(after.buffers[0].shape[1] if after.filled is None else after.filled, self.config.max_length)
        kept = tuple(buffer[:, :slots] for buffer in after.buffers)
        if segments is not None:
            mixed, positions = self._attend_rows(x, kept, past, after, segments)
        else:
            mixed, positions = self._attend_batch(x, kept, past, after)
        return mixed.to(made[1].dtype), positions, _as_state(after.buffers, after.positions)

    def _attend_batch(
        self, x: Tensor, kept: tuple[Tensor, ...], past: Tensor, after: Appended
    ) -> tuple[Tensor, Positions]:
        """The new tokens of every row attend to its slots [B,K,H,P]."""
        slots, tokens = kept[0].shape[1], x.shape[1]
        keys = kept[0] if len(kept) > 1 else None
        queries: Positions
        if after.uniform:
            queries, before = slice(slots - tokens, slots), None
        else:
            queries, before = past.unsqueeze(1) + torch.arange(tokens, device=x.device), past
        logits = self.logits.operands(x, queries, slice(0, slots), keys, slots)
        return self._attend(logits, kept[-1], queries, past=before), queries

    def _attend_rows(
        self, x: Tensor, kept: tuple[Tensor, ...], past: Tensor, after: Appended, segments: Segments
    ) -> tuple[Tensor, Positions]:
        """Packed new tokens; each piece attends to its row of the slots [S,K,H,P].

        The valid slots of all rows are packed in the order of the rows; the others follow as one more sequence that no
        query asks, so that shapes do not depend on values.
        """
        total, slots = x.shape[0] * x.shape[1], kept[0].shape[1]
        spare = torch.arange(slots, device=x.device) >= after.positions.unsqueeze(1)
        order = torch.argsort(spare.flatten().to(torch.int32), stable=True)
        packed = tuple(buffer.flatten(0, 1).index_select(0, order).unsqueeze(0) for buffer in kept)
        lengths = torch.where(segments.rows >= 0, after.positions[segments.rows.clamp(min=0)], 0)
        ends = lengths.cumsum(0)
        zero = ends.new_zeros(1)
        positions = segments.positions(total, past)
        keys = packed[0] if len(packed) > 1 else None
        logits = self.logits.operands(
            _as_one_row(x), positions, (order % slots).unsqueeze(0), keys, self.config.max_length
        )
        mixed = self._attend(
            logits,
            packed[-1],
            positions,
            cu_seqlens=torch.cat([segments.cu_seqlens, zero + total]),
            cu_seqlens_k=torch.cat([zero, ends, zero + order.shape[0]]),
        )
        return mixed, positions

    def _attend(
        self,
        logits: Logits,
        v: Tensor,
        queries: Positions,
        *,
        past: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> Tensor:
        """Inner products go to softmax attention, a table alone to one product, mixtures to the general operator.

        So do mixtures of inner products in float32 on a GPU: torch's kernels there multiply in TF32 thrice, to some 21
        bits, and the gradient of a mixture's weights, a difference of sums over everything, needs all 24.
        """
        q, k, left, right = (
            None if part is None else part.to(v.dtype) for part in (logits.q, logits.k, logits.left, logits.right)
        )
        causal, packing = self.config.causal, {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
        exact = self.backend == "auto" and v.is_cuda and v.dtype == torch.float32 and len(self.config.parts) > 1
        if q is not None and k is not None and logits.table is None and left is None and not exact:
            if past is None or self.backend != "triton":  # those kernels take no mask
                sees = None if past is None else valid_mask(past, v.shape[1], q.shape[1])
                causal = causal and sees is None
                return softmax_attention(q, k, v, causal=causal, scale=1.0, bias=sees, **packing, backend=self.backend)
        elif q is None and left is None and logits.table is not None and isinstance(queries, slice):
            table = logits.table[:, queries, : v.shape[1]]
            return random_attention(table, v, causal=causal, backend=self.backend)
        tokens = queries.stop - queries.start if isinstance(queries, slice) else queries.shape[1]
        return synthetic_attention(
            v, q=q, k=k, table=logits.table, left=left, right=right, queries=tokens, past=past, causal=causal,
            **packing, backend=self.backend,
        )  # fmt: skip

    def _expect_room(self, past: Tensor, lengths: Tensor | None, tokens: int) -> None:
        """Raise LengthError if a sequence passes max_length, where that can be seen before anything is stored."""
        if past.numel() and checks_values(past):
            longest = int((past + (tokens if lengths is None else lengths)).max())
            if longest > self.config.max_length:
                raise self._too_long(longest)

    def _too_long(self, tokens: int) -> LengthError:
        limit = self.config.max_length
        return LengthError(
            f"{self.name}: a sequence would have {tokens} tokens, max_length is {limit}; build it longer"
        )


def _as_one_row(x: Tensor) -> Tensor:
    """[B,T,...] -> [1,B T,...]."""
    return x.reshape(1, -1, *x.shape[2:])


def _as_state(buffers: tuple[Tensor, ...], positions: Tensor) -> SynthesizerState:
    """The state of buffers (keys if there are two, values) [B,K,H,P] and positions [B]."""
    if len(buffers) == 1:
        return ValueState(buffers[0], positions)
    return KeyValueState(buffers[0], buffers[1], positions)

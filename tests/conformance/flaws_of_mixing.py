"""Broken mixers whose outputs are wrong: interface, causality, state, packing, padding, length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sequence_mixer import State

from .flaws import caught_by
from .toys import Mean, MeanConfig, Toy, ToyConfig, ToyState, toy_capabilities

CORRECT = toy_capabilities(ToyConfig(d_model=64))


@caught_by("output_has_the_shape_dtype_and_device_of_the_input", "float32")
class ChangesTheDtype(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward(x, **options).float()


SINGLE = tuple(replace(spec, dtypes=("float32",)) for spec in CORRECT.backends)


@caught_by("float64_is_served", "float64", capabilities=replace(CORRECT, backends=SINGLE))
class ServesFloat32Only(Toy):
    pass


@caught_by("rows_of_a_batch_are_independent", "row")
class NormalisesOverTheBatch(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y = super().forward(x, **options)
        return y - 0.1 * y.mean(0, keepdim=True)


@caught_by("wrong_inputs_raise_in_words", "wanted")
class AcceptsAnything(Toy):
    def _check_call(self, x: Tensor, cu_seqlens: Tensor | None, padding_mask: Tensor | None) -> None:
        pass


@caught_by("malformed_packing_and_padding_raise", "PackingError")
class TrustsItsBoundaries(Toy):
    def _check_call(self, x: Tensor, cu_seqlens: Tensor | None, padding_mask: Tensor | None) -> None:
        super()._check_call(x, None, None)


@caught_by("later_tokens_leave_earlier_outputs_alone", "at t=0")
class LeaksThroughANorm(Toy):
    def finish(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return super().finish(y / (y.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-6).sqrt(), dtype)


@caught_by("later_tokens_leave_earlier_outputs_alone", "changed the output")
class LeaksByWrapAround(Toy):
    """Convolves by a transform of length T, so that the last tokens come round to the first outputs."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        kernel = 0.5 ** torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
        spectrum = torch.fft.rfft(x, dim=1) * torch.fft.rfft(kernel)[None, :, None]
        return super().forward(x, **options) + torch.fft.irfft(spectrum, n=x.shape[1], dim=1)


@caught_by("later_tokens_leave_earlier_outputs_alone", "changed the output")
class IgnoresCausal(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward(x, **options) + super().forward(x.flip(1), **options).flip(1)


@caught_by("earlier_outputs_send_no_gradient_to_later_tokens", "gradient")
class LeaksInTheGradientOnly(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        mean = x.mean(1, keepdim=True)
        return super().forward(x, **options) + (mean - mean.detach())


@caught_by("outputs_depend_on_earlier_tokens", "nothing is mixed")
class MixesNothing(Toy):
    def scan(self, q: Any, k: Any, v: Tensor, a: Any, start: Tensor, cu_seqlens: Any) -> tuple[Tensor, Tensor]:
        return v, start


@caught_by("outputs_depend_on_both_sides", "bidirectional", config=MeanConfig)
class SeesThePastOnly(Mean):
    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, values = super().weights(x)
        past = weights.tril()
        return past / past.sum(-1, keepdim=True), values


@caught_by("a_prefix_gives_the_first_outputs", "alone")
class KnowsTheLength(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward(x, **options) * (1 + 1 / (x.shape[1] + 1))


@caught_by("extend_in_pieces_equals_forward", "pieces of 1")
class ReturnsAStaleState(Toy):
    def mix(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        y, after = super().mix(x, state, **options)
        return y, after if state is None or x.shape[1] > 1 else state


@caught_by("extend_in_pieces_has_the_gradients_of_forward", "gradient")
class DropsTheFinalStateGradient(Toy):
    def mix(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        y, after = super().mix(x, state, **options)
        return y, after.detach()


@caught_by("extend_continues_from_a_state", "from a state")
class RestartsOnLongPieces(Toy):
    def mix(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        return super().mix(x, None if options["cu_seqlens"] is None and x.shape[1] > 8 else state, **options)


@caught_by("old_states_stay_valid", "going back")
class ChangesItsStateInPlace(Toy):
    def mix(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        y, after = super().mix(x, state, **options)
        if state is None or torch.is_grad_enabled():
            return y, after
        return y, ToyState(state.sums.copy_(after.sums))


@caught_by("forks_are_independent", "fork")
class KeepsItsStateInTheModule(Toy):
    newest: Any = None

    def mix(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        if state is not None and x.shape[1] == 1 and self.newest is not None:
            state = self.newest
        y, after = super().mix(x, state, **options)
        if state is not None:
            self.newest = after
        return y, after


@caught_by("donated_states_give_the_same_outputs", "donated")
class LosesDonatedStates(Toy):
    def mix(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        if state is not None and options["donate"]:
            state.sums.zero_()
        return super().mix(x, state, **options)


class CountingState(State):
    sums: Tensor
    seen: Tensor  # no batch


@caught_by("a_state_is_a_value", "batch is not first")
class CountsWithoutABatch(Toy):
    def mix(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        y, after = super().mix(x, state, **options)
        return y, CountingState(after.sums, torch.zeros((), device=x.device))

    def empty_state(self, *arguments: Any) -> Any:
        return CountingState(super().empty_state(*arguments).sums, torch.zeros(()))


@caught_by("recurrent_state_is_kept_in_the_accumulation_dtype", "state.sums")
class KeepsAHalfPrecisionState(Toy):
    def mix(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        start = None if state is None else ToyState(state.sums.to(torch.float32))
        y, after = super().mix(x, start, **options)
        return y, ToyState(after.sums.to(x.dtype))


@caught_by("initial_state_takes_device_dtype_and_capacity", "wanted")
class IgnoresTheAskedDtype(Toy):
    def empty_state(self, batch_size: int, capacity: Any, device: Any, dtype: Any) -> ToyState:
        return super().empty_state(batch_size, capacity, device, self.out.weight.dtype)


@caught_by("packed_equals_separate", "packed")
class IgnoresBoundaries(Toy):
    def scan(self, q: Any, k: Any, v: Any, a: Any, start: Tensor, cu_seqlens: Any) -> tuple[Tensor, Tensor]:
        return super().scan(q, k, v, a, start if cu_seqlens is None else start[:1], None)


@caught_by("nothing_crosses_a_boundary", "others")
class NormalisesAcrossThePack(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y = super().forward(x, **options)
        return y if options.get("cu_seqlens") is None else y + 1e-3 * x.mean(1, keepdim=True)


@caught_by("packed_states_equal_separate_states", "packed pieces")
class MixesUpPackedStates(Toy):
    def mix(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        y, after = super().mix(x, state, **options)
        return y, after if options["cu_seqlens"] is None else ToyState(after.sums.flip(0))


@caught_by("packed_states_equal_separate_states", "packed pieces")
class ForgetsEmptySequences(Toy):
    """The state of a sequence that got no tokens becomes zero."""

    def mix(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        y, after = super().mix(x, state, **options)
        if options["cu_seqlens"] is None:
            return y, after
        return y, ToyState(after.sums * (options["cu_seqlens"].diff() > 0)[:, None, None, None])


@caught_by("padded_equals_unpadded", "padded batch")
class TakesPaddingForTokens(Toy):
    pads_natively = True

    def mix(self, x: Tensor, state: Any, *, padding_mask: Any, **options: Any) -> tuple[Tensor, Any]:
        if padding_mask is None:
            return super().mix(x, state, padding_mask=None, **options)
        real = padding_mask.unsqueeze(-1)
        y, after = super().mix(torch.where(real, x, 0), state, padding_mask=None, **options)
        return torch.where(real, y, 0), after


@caught_by("padded_outputs_are_zero", "padded slots")
class WritesIntoPadding(Toy):
    def _mix(self, x: Tensor, state: Any, cu_seqlens: Any, padding_mask: Any, donate: bool) -> tuple[Tensor, Any]:
        y, after = super()._mix(x, state, cu_seqlens, padding_mask, donate)
        return (y if padding_mask is None else torch.where(padding_mask.unsqueeze(-1), y, self.out.bias)), after


@caught_by("nan_in_padded_slots_is_harmless", "NaN")
class MultipliesPaddingAway(Toy):
    def _mix(self, x: Tensor, state: Any, cu_seqlens: Any, padding_mask: Any, donate: bool) -> tuple[Tensor, Any]:
        y, after = super()._mix(x, state, cu_seqlens, padding_mask, donate)
        return (y if padding_mask is None else y + (x * padding_mask.unsqueeze(-1)).sum(1, keepdim=True) * 0), after


@caught_by("padding_does_not_reach_the_state", "padded pieces")
class LetsPaddingIntoTheState(Toy):
    def _mix(self, x: Tensor, state: Any, cu_seqlens: Any, padding_mask: Any, donate: bool) -> tuple[Tensor, Any]:
        y, after = super()._mix(x, state, cu_seqlens, padding_mask, donate)
        if padding_mask is None or state is None:
            return y, after
        clean = torch.where(padding_mask.unsqueeze(-1), x, 0)
        return y, super()._mix(clean, state, None, None, donate)[1]


@caught_by("every_length_is_served", "T=")
class SkipsTheTail(Toy):
    """The last tokens that fill no chunk get nothing, on the fast path alone."""

    def scan(self, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        y, after = super().scan(q, *rest)
        tokens = q.shape[1] if self.backend == "reference" else q.shape[1] // 16 * 16
        return torch.cat([y[:, :tokens], torch.zeros_like(y[:, tokens:])], 1), after


@caught_by("more_than_max_length_raises", "accepted", config=MeanConfig)
class CutsLongInputs(Mean):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward(x[:, : self.config.max_length], **options)


@caught_by("no_tokens_give_an_empty_result_or_an_error_in_words", "T=0")
class MakesATokenOfNothing(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward(x, **options) if x.shape[1] else x.new_zeros(x.shape[0], 1, x.shape[2])

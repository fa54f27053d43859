"""Broken mixers that break a promise: structure, backends, purity, storage, configs, cost, capabilities, training."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from sequence_mixer import (
    BackendSpec,
    Cost,
    LowRank,
    Masked,
    MatrixForm,
    RowStochastic,
    Semiseparable,
    State,
    Toeplitz,
)
from sequence_mixer.config import Count
from sequence_mixer.errors import BackendError

from .flaws import caught_by
from .toys import MEAN, Mean, MeanConfig, Toy, ToyConfig, toy_capabilities

CORRECT = toy_capabilities(ToyConfig(d_model=64))


def with_structures(*structures: Any) -> Any:
    return replace(CORRECT, structures=structures)


@caught_by("the_matrix_form_reproduces_the_output", "matrix_form")
class LeavesTheDecayOutOfTheMatrix(Toy):
    def matrix_form(self, x: Tensor) -> MatrixForm:
        form = super().matrix_form(x)
        assert form.factors is not None
        left, right = form.factors.left, form.factors.right
        return replace(form, build=lambda h: torch.einsum("bthn,bshn->bhts", left[:, :, h], right[:, :, h]).tril())


@caught_by("a_causal_matrix_is_lower_triangular", "above the diagonal")
class ShowsASymmetricMatrix(Toy):
    def matrix_form(self, x: Tensor) -> MatrixForm:
        form = super().matrix_form(x)
        return replace(form, build=lambda h: form.build(h) + form.build(h).mT.triu(1))


@caught_by("the_matrix_depends_on_the_input_as_declared", "differ", capabilities=replace(CORRECT, data_dependent=False))
class SaysItIsTimeInvariant(Toy):
    pass


@caught_by("strictly_lower_blocks_have_the_declared_rank", "has rank", capabilities=with_structures(Semiseparable(4)))
class DeclaresTooSmallARank(Toy):
    pass


@caught_by(
    "the_matrix_has_the_declared_low_rank",
    "rank",
    config=MeanConfig,
    capabilities=replace(MEAN, structures=(LowRank(4),)),
)
class DeclaresALowRank(Mean):
    pass


@caught_by(
    "a_toeplitz_matrix_depends_on_the_distance_only",
    "diagonal",
    config=MeanConfig,
    capabilities=replace(MEAN, structures=(Toeplitz(),)),
)
class DeclaresToeplitz(Mean):
    pass


@caught_by("masked_factors_give_the_matrix", "not Toeplitz", capabilities=with_structures(Masked(Toeplitz(), 8)))
class DeclaresAToeplitzMask(Toy):
    pass


@caught_by("masked_factors_give_the_matrix", "factors miss")
class GivesFactorsWithoutAScale(Toy):
    def matrix_form(self, x: Tensor) -> MatrixForm:
        form = super().matrix_form(x)
        assert form.factors is not None
        return replace(form, factors=replace(form.factors, left=2 * form.factors.left))


@caught_by("rows_are_weights_that_sum_to_one", "sums to 1", config=MeanConfig)
class WeighsMoreThanOne(Mean):
    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, values = super().weights(x)
        return 1.1 * weights, values


@caught_by("backends_agree_in_float64", "chunked")
class RepeatsInsteadOfInterleaving(Toy):
    def repeated(self, t: Tensor) -> Tensor:
        times = self.config.n_heads // self.config.n_groups
        return super().repeated(t) if self.backend == "reference" else t.repeat(1, 1, times, 1)


@caught_by("backends_agree_with_the_float64_reference", "plain path")
class RoundsInThePlainPath(Toy):
    def repeated(self, t: Tensor) -> Tensor:
        repeated = super().repeated(t)
        return repeated.bfloat16().float() if repeated.dtype == torch.float32 else repeated


FAST = (BackendSpec("fast"), *CORRECT.backends)


class _WithAFastBackend(Toy):
    def sizes(self, tokens: int) -> list[int]:
        if self.backend not in ("auto", "fast", "chunked", "reference"):
            raise BackendError(f"toy has no backend {self.backend!r}")
        return [1] * tokens if self.backend == "reference" else [tokens]


@caught_by("backends_agree_with_the_float64_reference", "fast", capabilities=replace(CORRECT, backends=FAST))
class RoundsInTheFastPath(_WithAFastBackend):
    def repeated(self, t: Tensor) -> Tensor:
        repeated = super().repeated(t)
        rounds = self.backend == "fast" and repeated.dtype == torch.float32
        return repeated + (repeated.half().float() - repeated).detach() if rounds else repeated


@caught_by("scratch_memory_is_never_read", "fresh memory")
class ReadsFreshMemory(Toy):
    def finish(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return super().finish(y + torch.empty_like(y).isnan(), dtype)


@caught_by("inputs_are_not_modified", "x is not")
class ChangesItsInput(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        x.detach().clamp_(-1, 1)
        return super().forward(x, **options)


@caught_by("forward_changes_no_parameter_or_buffer", "gain")
class CountsInABuffer(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y = super().forward(x, **options)
        if self.training:
            self.gain = self.gain * 1.001
        return y


@caught_by("training_equals_evaluation", "eval")
class DropsOut(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return F.dropout(super().forward(x, **options), 0.1, self.training)


@caught_by("results_repeat_bit_for_bit", "again")
class AddsNoise(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y = super().forward(x, **options)
        return y + 1e-7 * torch.randn_like(y)


@caught_by("a_call_draws_no_random_numbers", "random state")
class DrawsANumber(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        torch.rand(1)
        return super().forward(x, **options)


@caught_by("strides_do_not_matter", "differs")
class IgnoresStrides(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        _batch, tokens, width = x.shape
        return super().forward(x.as_strided(x.shape, (tokens * width, width, 1)), **options)


@caught_by("extend_takes_any_strides", "transposed")
class IgnoresStridesOfAToken(Toy):
    def extend(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        if x.shape[1] == 1 and x.stride(2) != 1:
            x = x.as_strided(x.shape, (x.shape[2], x.shape[2], 1))
        return super().extend(x, state, **options)


@caught_by("autocast_gives_its_dtype_and_its_accuracy", "float32")
class LeavesAutocast(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward(x, **options).to(x.dtype)


@caught_by("nothing_is_complex", "complex")
class HoldsAComplexBuffer(Toy):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.register_buffer("roots", torch.ones(4, dtype=torch.complex64))


@caught_by("gradients_have_the_dtype_of_their_tensor", "no gradient")
class HasAParameterThatDoesNothing(Toy):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.spare = nn.Parameter(torch.zeros(3))


@caught_by("state_dict_round_trip", "load_state_dict")
class HidesAWeight(Toy):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.register_buffer("gain", 1 + 0.1 * torch.randn(self.config.d_model), persistent=False)


@caught_by("deepcopy_and_pickle", "pickle")
class HoldsALambda(Toy):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.scale_of = lambda y: y


_BUILT = itertools.count(1)


@caught_by("the_same_seed_builds_the_same_mixer", "one seed")
class CountsItsBuilds(Toy):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gain.mul_(next(_BUILT))


class ForgetfulConfig(ToyConfig):
    gain: float = Field(1.0, exclude=True)


@caught_by(
    "config_json_and_yaml_round_trips",
    "did not give the config back",
    config=ForgetfulConfig,
    example={"gain": 2.0},
    name="ForgetsInJson",
)
@caught_by("a_mixer_is_built_from_its_dumped_config", "gain", config=ForgetfulConfig, example={"gain": 2.0})
class BuiltFromAForgetfulConfig(Toy):
    def __init__(self, config: Any, *arguments: Any) -> None:
        super().__init__(config, *arguments)
        self.gain.mul_(config.gain)


class OpenConfig(ToyConfig):
    model_config = ConfigDict(extra="ignore")


class LaxConfig(ToyConfig):
    d_model: int = 64


class ThawedConfig(ToyConfig):
    model_config = ConfigDict(frozen=False)


class NarrowConfig(ToyConfig):
    d_model: Count = Field(le=128)


for kind, check, says in (
    (OpenConfig, "unknown_keys_are_refused", "d_modle"),
    (LaxConfig, "whole_numbers_are_strict", "accepted"),
    (ThawedConfig, "a_config_is_frozen", "frozen"),
    (NarrowConfig, "defaults_serve_usual_widths", "d_model=192"),
):
    caught_by(check, says, config=kind, name=kind.__name__)(Toy)


@caught_by("compiled_forward_equals_eager", "broke the graph")
class BreaksTheGraph(Toy):
    def finish(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        torch._dynamo.graph_break()
        return super().finish(y, dtype)


@caught_by("compiled_packing_equals_eager", "broke the graph")
class LooksAtTheBoundaries(Toy):
    def scan(self, q: Any, k: Any, v: Any, a: Any, start: Any, cu_seqlens: Any) -> tuple[Tensor, Tensor]:
        if cu_seqlens is not None and bool(cu_seqlens[1] == 0):
            k = k + 0
        return super().scan(q, k, v, a, start, cu_seqlens)


@caught_by("compiled_padding_equals_eager", "broke the graph")
class LooksAtTheMask(Toy):
    def _mix(self, x: Tensor, state: Any, cu_seqlens: Any, padding_mask: Any, donate: bool) -> tuple[Tensor, Any]:
        if padding_mask is not None and bool(padding_mask.all()):
            padding_mask = None
        return super()._mix(x, state, cu_seqlens, padding_mask, donate)


@caught_by("compiled_extend_equals_eager", "broke the graph")
class LooksAtItsState(Toy):
    def mix(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        if state is not None and float(state.sums.abs().max()) > 1e6:
            x = x * 1
        return super().mix(x, state, **options)


@caught_by("activation_checkpointing_changes_nothing", "checkpointing")
class RecomputesSomethingElse(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        recomputes = torch._C._current_graph_task_id() != -1
        return super().forward(x * 1.1 if recomputes else x, **options)


class _Costs(Toy):
    factors: tuple[float, float, float, float] = (1, 1, 1, 1)

    def cost(self, *arguments: Any) -> Cost:
        true = super().cost(*arguments)
        values = (true.flops, true.bytes, true.parameters, true.state_elements)
        return Cost(*(int(value * factor) for value, factor in zip(values, self.factors, strict=True)))


@caught_by("cost_predicts_the_flops", "FLOPs")
class UnderstatesItsFlops(_Costs):
    factors = (0.5, 1, 1, 1)


@caught_by("cost_predicts_the_least_bytes", "bytes")
class UnderstatesItsBytes(_Costs):
    factors = (1, 0.5, 1, 1)


@caught_by("cost_counts_the_parameters_exactly", "parameters")
class MiscountsItsParameters(_Costs):
    factors = (1, 1, 1.001, 1)


@caught_by("cost_counts_the_state_exactly", "state elements")
class MiscountsItsState(_Costs):
    factors = (1, 1, 1, 2)


@caught_by("flops_grow_as_declared", "linear growth")
@caught_by("memory_grows_as_declared", "linear growth", name="IsQuadraticInMemory")
class IsQuadratic(Toy):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.matrix_form(x).apply()


class GrowingState(State):
    sums: Tensor
    past: Tensor  # [B,T,D]


@caught_by("the_state_grows_as_declared", "grew")
class KeepsThePast(Toy):
    def mix(self, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        y, after = super().mix(x, state, **options)
        past = x if state is None else torch.cat([state.past, x], 1)
        return y, GrowingState(after.sums, past)

    def empty_state(self, batch_size: int, capacity: Any, device: Any, dtype: Any) -> Any:
        sums = super().empty_state(batch_size, capacity, device, dtype).sums
        return GrowingState(sums, torch.zeros(batch_size, 0, self.config.d_model, device=device, dtype=dtype))


@caught_by("declared_capabilities_are_served", "matrix_form is declared")
class HasNoMatrixForm(Toy):
    def matrix_form(self, x: Tensor) -> MatrixForm:
        raise NotImplementedError("later")


@caught_by("undeclared_capabilities_are_refused", "was accepted", capabilities=replace(CORRECT, varlen=False))
class AcceptsWhatItDoesNotDeclare(Toy):
    def _require(self, capability: str) -> None:
        pass


@caught_by(
    "capabilities_are_those_of_the_definition", "differs", capabilities=replace(CORRECT, structures=(RowStochastic(),))
)
class DisagreesWithItsDefinition(Toy):
    def __init__(self, config: Any, capabilities: Any = None) -> None:
        super().__init__(config)


@caught_by("optimiser_hints_name_parameters", "no parameter")
class HintsAtNothing(Toy):
    def parameter_groups(self) -> Any:
        return {"inot.bias": {"weight_decay": 0.0}}


@caught_by("after_step_is_reproducible", "after_step")
class RedrawsFromTheGlobalState(Toy):
    def after_step(self, step: int, generator: Any = None) -> None:
        self.gain.copy_(torch.rand(self.gain.shape))


@caught_by("a_step_downhill_lowers_the_loss", "lower the loss")
class DoublesItsGradient(Toy):
    def finish(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return super().finish(2 * y - y.detach(), dtype)

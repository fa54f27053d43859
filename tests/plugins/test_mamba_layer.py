"""The Mamba-1 layer against its own equations, recorded layers, and what the contract asks of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.selective_scan.triton_path import WIDEST
from zoo.ops.short_convolution import MAX_KERNEL_WIDTH

from golden import load_case
from layers import (
    EXACT,
    FLOAT64,
    PADS,
    agree,
    build,
    expect_recorded,
    extend_in_pieces,
    from_case,
    padded,
    tokens,
    with_gradients,
)
from sequence_mixer import State
from sequence_mixer.conformance.budget import relative_rms
from sequence_mixer.definition import Semiseparable
from sequence_mixer.errors import ReferenceMismatch, ShapeError, StateError
from zoo_mamba import EXAMPLES, zoo_register_mixers
from zoo_mamba.config import KERNEL_TAPS, KERNEL_WIDEST, MambaConfig, capabilities_of
from zoo_mamba.from_reference import from_reference
from zoo_mamba.mixer import MambaMixer, MambaState
from zoo_mamba.reference import mamba_layer_reference

DEFINITION = zoo_register_mixers()[0]
CASES = ["mamba1", "mamba1_conv3_bias", "tf_mamba"]


def layer(example: str = "default", backend: str = "auto") -> MambaMixer:
    """A float64 layer whose parameters are all away from their initial zeros, ones and logarithms."""
    mixer = build(DEFINITION, example)
    assert isinstance(mixer, MambaMixer)
    mixer.backend = backend
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_layer_equals_its_equations(example: str, backend: str) -> None:
    mixer, x, cotangent = layer(example, backend), tokens(2, 23).requires_grad_(), tokens(2, 23)
    wanted, _ = mamba_layer_reference(mixer.config, dict(mixer.named_parameters()), x)
    found = with_gradients(mixer, mixer(x), x, cotangent=cotangent)
    agree(found, with_gradients(mixer, wanted, x, cotangent=cotangent))
    assert all(float(each.abs().max()) > 0 for each in found)  # every parameter trains, biases too


@pytest.mark.parametrize("length", [1, 2, 33, 65])
def test_any_length_gives_the_output_and_the_state_of_the_equations(length: int) -> None:
    mixer, x = layer("biases"), tokens(1, length)
    y, state = mixer.extend(x, mixer.initial_state(1))
    truth, (conv, ssm) = mamba_layer_reference(mixer.config, dict(mixer.named_parameters()), x)
    agree([y, state.conv, state.ssm], [truth, conv, ssm])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_recorded(name: str, dtype: torch.dtype) -> None:
    case = load_case(name)
    mixer = from_case("mamba", case, dtype)
    expect_recorded(case, mixer, dtype, {key: (key, slice(None)) for key, _ in mixer.named_parameters()})


@pytest.mark.parametrize("name", CASES)
def test_states_and_decode_steps_are_those_recorded(name: str) -> None:
    case = load_case(name)
    mixer, x = from_case("mamba", case, torch.float64), case.tensors["x"]
    with torch.no_grad():
        _, prefilled = mixer.extend(x, mixer.initial_state(x.shape[0]))
        y, state = extend_in_pieces(mixer, x, [1] * x.shape[1], donate=True)
    assert relative_rms(y, case.tensors["y_step"]) < FLOAT64
    conv = case.tensors["final_conv_state"][..., 1:]  # the record keeps one input more than the convolution needs
    for reached in (prefilled, state):
        assert relative_rms(reached.ssm, case.tensors["final_state"]) < FLOAT64
        assert relative_rms(reached.conv, conv) < FLOAT64


@pytest.mark.parametrize("example", EXAMPLES)
def test_pieces_give_what_the_whole_gives(example: str) -> None:
    mixer, x, cotangent = layer(example), tokens(2, 28).requires_grad_(), tokens(2, 28)
    pieces, _ = extend_in_pieces(mixer, x, [1, 2, 1, 17, 7])
    agree(
        with_gradients(mixer, pieces, x, cotangent=cotangent), with_gradients(mixer, mixer(x), x, cotangent=cotangent)
    )


def test_packed_and_padded_sequences_do_not_meet() -> None:
    mixer = layer("biases")
    rows = [tokens(1, length)[0] for length in (11, 16, 15, 11)]
    alone = [mixer.extend(row[None], mixer.initial_state(1)) for row in rows]
    ends = torch.tensor([0, 11, 27, 27, 42, 53])
    y, state = mixer.extend(torch.cat(rows)[None], mixer.initial_state(5), cu_seqlens=ends)
    agree([y], [torch.cat([each for each, _ in alone], 1)])
    agree([state.ssm[[0, 1, 3, 4]], state.conv[[0, 1, 3, 4]]], _stacked([after for _, after in alone]))
    assert not state.ssm[2].any()
    x, mask = padded(rows, PADS)
    y, state = mixer.extend(x, mixer.initial_state(4), padding_mask=mask)
    for n, (each, _) in enumerate(alone):
        agree([y[n, mask[n]]], [each[0]])
    assert not y[~mask].any()
    agree([state.ssm, state.conv], _stacked([after for _, after in alone]))


def _stacked(states: list[MambaState]) -> list[Tensor]:
    return [torch.cat([each.ssm for each in states]), torch.cat([each.conv for each in states])]


def test_a_donated_state_is_overwritten_in_place_and_gives_the_same() -> None:
    mixer, x = layer(), tokens(2, 5)
    with torch.no_grad():
        kept, given = mixer.initial_state(2), mixer.initial_state(2)
        places = [leaf.data_ptr() for leaf in given.leaves().values()]
        for token in x.split(1, 1):
            y, kept = mixer.extend(token, kept)
            donated, given = mixer.extend(token, given, donate=True)
            assert torch.equal(y, donated)
            assert [leaf.data_ptr() for leaf in given.leaves().values()] == places
    agree(list(kept.leaves().values()), list(given.leaves().values()))


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_matrix_form_is_the_layer_and_semiseparable(example: str) -> None:
    mixer, x, cotangent = layer(example), tokens(1, 28).requires_grad_(), tokens(1, 28)
    form = mixer.matrix_form(x)
    agree(
        with_gradients(mixer, form.apply(), x, cotangent=cotangent),
        with_gradients(mixer, mixer(x), x, cotangent=cotangent),
    )
    matrix = form.heads(slice(3, 5)).detach()
    agree([matrix], [form.matrix[:, 3:5]])
    assert form.n_heads == mixer.config.channels
    assert not matrix.triu(1).any()
    rank = mixer.config.d_state
    assert mixer.capabilities.structures == (Semiseparable(rank),)
    singular = torch.linalg.svdvals(matrix[..., 14:, :14])
    assert bool((singular[..., rank:] <= 1e-10 * singular[..., :1]).all())


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_cost_is_what_torch_counts(example: str) -> None:
    mixer, x = layer(example), tokens(2, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(x)
    cost = mixer.cost(2, 64, torch.float64)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert cost.parameters == sum(parameter.numel() for parameter in mixer.parameters())
    assert cost.state_elements == sum(leaf.numel() for leaf in mixer.initial_state(2).leaves().values())
    assert cost.bytes == 8 * (cost.parameters + 2 * x.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_states_keep_their_precision_in_low_precision_layers(dtype: torch.dtype) -> None:
    exact, mixer, x = layer(), layer(), tokens(2, 40)
    mixer.load_state_dict(exact.state_dict())
    mixer = mixer.to(dtype)
    y, state = mixer.extend(x.to(dtype), mixer.initial_state(2))
    assert (y.dtype, state.conv.dtype, state.ssm.dtype) == (dtype, dtype, torch.float32)
    y, state = mixer.extend(x.to(dtype), state)
    assert relative_rms(y, exact(torch.cat([x, x], 1))[:, 40:]) < 16 * torch.finfo(dtype).eps


def test_rates_skip_and_bias_may_stay_in_single_precision_beside_half_weights() -> None:
    mixer = layer().to(torch.bfloat16)
    for name in ("A_log", "D"):
        setattr(mixer, name, torch.nn.Parameter(getattr(mixer, name).float()))
    mixer.dt_proj.bias = torch.nn.Parameter(mixer.dt_proj.bias.float())
    x = tokens(1, 9).bfloat16().requires_grad_()
    y = mixer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in mixer.parameters())


@pytest.mark.parametrize("length", [1, 20])
def test_the_layer_compiles_without_graph_breaks(length: int) -> None:
    mixer, x = layer(), tokens(2, length)
    compiled: Callable[..., Any] = torch.compile(mixer.extend, fullgraph=True, backend="aot_eager")
    y, state = mixer.extend(x, mixer.initial_state(2))
    y_compiled, state_compiled = compiled(x, mixer.initial_state(2))
    agree([y, state.ssm, state.conv], [y_compiled, state_compiled.ssm, state_compiled.conv])


def test_initial_values_are_the_reference_implementations() -> None:
    torch.manual_seed(1)
    mixer = DEFINITION.make(MambaConfig(d_model=1024, d_state=4, dt_scale=0.5))
    assert isinstance(mixer, MambaMixer)
    agree([mixer.A_log.exp().double()], [torch.arange(1.0, 5).repeat(2048, 1).double()])
    assert torch.equal(mixer.D, torch.ones(2048))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.999e-3 <= steps.min() < 1.1e-3
    assert 0.09 < steps.max() <= 0.1001
    assert abs(steps.log().mean().item() - math.log(1e-2)) < 0.1  # the middle of log 1e-3 and log 1e-1
    assert mixer.config.rank == 64
    assert 0.06 < mixer.dt_proj.weight.abs().max() <= 0.0625  # dt_scale / sqrt(R)
    constant = DEFINITION.make(MambaConfig(d_model=100, dt_init="constant", dt_min=1e-6, dt_max=2e-6))
    assert isinstance(constant, MambaMixer)
    assert constant.config.rank == 7  # 100 / 16, rounded up
    torch.testing.assert_close(constant.dt_proj.weight, torch.full((200, 7), 7**-0.5))
    floors = torch.nn.functional.softplus(constant.dt_proj.bias)
    torch.testing.assert_close(floors, torch.full_like(floors, 1e-4))


def test_parameters_are_named_and_shaped_as_mamba_ssm_has_them() -> None:
    shapes = {name: tuple(p.shape) for name, p in layer("default").named_parameters()}
    assert shapes == {
        "A_log": (128, 16),
        "D": (128,),
        "in_proj.weight": (256, 64),
        "conv1d.weight": (128, 1, 4),
        "conv1d.bias": (128,),
        "x_proj.weight": (4 + 2 * 16, 128),
        "dt_proj.weight": (128, 4),
        "dt_proj.bias": (128,),
        "out_proj.weight": (64, 128),
    }
    biases = {name for name, _ in layer("biases").named_parameters() if name.endswith("bias")}
    assert biases == {"in_proj.bias", "dt_proj.bias", "out_proj.bias"}
    assert set(layer().parameter_groups()) == {"A_log", "D"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dt_min": 0.5}, "dt_min=0.5 is above dt_max=0.1"),
        ({"dt_rank": "half"}, "dt_rank"),
        ({"dt_rank": 0}, "dt_rank"),
        ({"dt_init": "zeros"}, "dt_init"),
        ({"dt_scale": math.inf}, "dt_scale"),
        ({"d_state": 16.0}, "integer"),
        ({"chunk_size": 64}, "Extra inputs"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_in_words(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        MambaConfig.model_validate({"d_model": 64, **options})


def test_the_state_of_another_mixer_is_refused() -> None:
    class Strange(State):
        total: Tensor

    mixer = layer()
    with pytest.raises(StateError, match=r"Strange.*MambaState"):
        mixer.extend(tokens(1, 2), Strange(torch.zeros(1, 3)))
    with pytest.raises(ShapeError, match="initial_state"):
        mixer.extend(tokens(1, 2), layer("biases").initial_state(1))


def test_triton_is_declared_exactly_where_its_kernels_serve() -> None:
    assert (KERNEL_WIDEST, KERNEL_TAPS) == (WIDEST, MAX_KERNEL_WIDTH)

    def names(**options: Any) -> list[str]:
        return [spec.name for spec in capabilities_of(MambaConfig(d_model=64, **options)).backends]

    assert names() == ["triton", "chunked", "reference"]
    assert names(d_state=KERNEL_WIDEST + 1) == names(d_conv=KERNEL_TAPS + 1) == ["chunked", "reference"]


@pytest.mark.parametrize(
    ("peer", "config", "told"),
    [
        ("Mamba2", {"d_model": 64}, "did you mean Mamba"),
        ("Mamba", {"d_state": 64}, "argument 'd_model' is missing"),
        ("Mamba", {"d_model": 64, "dt_limit": (0.0, 1.0)}, "argument 'dt_limit' is not known"),
        ("Mamba", {"d_model": 64, "dt_init": "zeros"}, "dt_init"),
        ("MambaMixer", {"hidden_size": 64, "hidden_act": "relu"}, "hidden_act='relu' is not reproduced"),
        ("MambaMixer", {"hidden_size": 64, "intermediate_size": 96}, "intermediate_size=96, wanted"),
    ],
)
def test_an_option_of_a_reference_that_is_not_reproduced_is_refused(peer: str, config: Any, told: str) -> None:
    with pytest.raises(ReferenceMismatch, match=told):
        from_reference(peer, config, {})


def test_a_reference_left_to_its_defaults_is_read_with_them() -> None:
    assert from_reference("Mamba", {"d_model": 64}, {})[0] == MambaConfig(d_model=64)
    assert from_reference("MambaMixer", {}, {})[0] == MambaConfig(d_model=768)


def test_weights_of_the_reference_load_under_their_names() -> None:
    mixer = layer("biases")
    config = {"d_model": 64, "d_state": 8, "d_conv": 2, "expand": 1, "bias": True, "conv_bias": False}
    again = zoo.from_reference("mamba", "Mamba", config, mixer.state_dict())
    x = tokens(1, 9)
    torch.testing.assert_close(again(x), mixer(x), **EXACT)

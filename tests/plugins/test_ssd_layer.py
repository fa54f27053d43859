"""The SSD layer against its own equations, and what the contract asks of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.norm import MAX_KERNEL_GROUP
from zoo.ops.semiseparable.triton_path import WIDEST
from zoo.ops.short_convolution import MAX_KERNEL_WIDTH

from sequence_mixer import State
from sequence_mixer.errors import ReferenceMismatch, ShapeError, StateError
from zoo_ssd import EXAMPLES, zoo_register_mixers
from zoo_ssd.config import KERNEL_NORM_GROUP, KERNEL_TAPS, KERNEL_WIDEST, SsdConfig, capabilities_of
from zoo_ssd.from_reference import from_reference
from zoo_ssd.mixer import SsdMixer, SsdState
from zoo_ssd.reference import ssd_layer_reference

DEFINITION = zoo_register_mixers()[0]
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def layer(example: str = "default", **changes: Any) -> SsdMixer:
    """A float64 layer whose parameters are all away from their initial zeros and ones."""
    mixer = DEFINITION.make(DEFINITION.example(example).model_copy(update=changes))
    assert isinstance(mixer, SsdMixer)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer.double()


def tokens(batch: int, length: int, width: int = 64) -> Tensor:
    return torch.randn(batch, length, width, dtype=torch.float64)


def gradients(y: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    found = torch.autograd.grad((y * torch.randn_like(y)).sum(), list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


def reference(mixer: SsdMixer, x: Tensor, state: State | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    past = (state.conv, state.ssm) if isinstance(state, SsdState) else None
    return ssd_layer_reference(mixer.config, dict(mixer.named_parameters()), x, past)


@pytest.mark.parametrize("backend", ["auto", "reference", "chunked"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_layer_computes_its_equations_and_their_gradients(example: str, backend: str) -> None:
    mixer, x = layer(example), tokens(2, 67).requires_grad_()
    mixer.backend = backend
    wanted = {"x": x, **dict(mixer.named_parameters())}
    y, (truth, _) = mixer(x), reference(mixer, x)
    torch.testing.assert_close(y, truth, **EXACT)
    ours, theirs = gradients(y, wanted), gradients(truth, wanted)
    for name in wanted:
        torch.testing.assert_close(ours[name], theirs[name], **EXACT, msg=lambda told, name=name: f"{name}: {told}")
        assert ours[name].abs().max() > 0, name


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
def test_any_length_gives_the_output_and_the_state_of_the_equations(length: int) -> None:
    mixer, x = layer("part_mlp"), tokens(1, length)
    y, state = mixer.extend(x, mixer.initial_state(1))
    truth, (conv, ssm) = reference(mixer, x)
    torch.testing.assert_close(y, truth, **EXACT)
    torch.testing.assert_close(state.conv, conv, **EXACT)
    torch.testing.assert_close(state.ssm, ssm, **EXACT)


@pytest.mark.parametrize("example", EXAMPLES)
def test_pieces_give_what_the_whole_gives_and_leave_old_states_valid(example: str) -> None:
    mixer, x = layer(example), tokens(2, 75).requires_grad_()
    wanted = {"x": x, **dict(mixer.named_parameters())}
    whole = mixer(x)
    state, outputs, seen = mixer.initial_state(2), [], []
    for piece in x.split([1, 2, 1, 64, 7], dim=1):
        seen.append((state, [leaf.clone() for leaf in state.leaves().values()]))
        y, state = mixer.extend(piece, state)
        outputs.append(y)
    for old, copies in seen:
        for leaf, copy in zip(old.leaves().values(), copies, strict=True):
            assert torch.equal(leaf, copy)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, **EXACT)
    by_pieces, at_once = gradients(torch.cat(outputs, 1), wanted), gradients(whole, wanted)
    for name in wanted:
        torch.testing.assert_close(by_pieces[name], at_once[name], **EXACT)


@pytest.mark.parametrize("example", ["groups", "learnable_state", "limited_steps"])
def test_packed_sequences_do_not_meet(example: str) -> None:
    mixer, x = layer(example), tokens(1, 40)
    cu_seqlens = torch.tensor([0, 11, 11, 12, 40])
    y, state = mixer.extend(x, mixer.initial_state(4), cu_seqlens=cu_seqlens)
    torch.testing.assert_close(mixer(x, cu_seqlens=cu_seqlens), y, **EXACT)
    for row, (start, end) in enumerate([(0, 11), (11, 11), (11, 12), (12, 40)]):
        alone, after = mixer.extend(x[:, start:end], mixer.initial_state(1))
        torch.testing.assert_close(y[:, start:end], alone, **EXACT)
        torch.testing.assert_close(state.ssm[row], after.ssm[0], **EXACT)
        torch.testing.assert_close(state.conv[row], after.conv[0], **EXACT)


@pytest.mark.parametrize("example", ["default", "learnable_state"])
def test_padding_on_either_side_changes_nothing(example: str) -> None:
    mixer, x = layer(example), tokens(3, 20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[0, :6] = False
    mask[1, 13:] = False
    dirty = x.masked_fill(~mask[..., None], math.nan).requires_grad_()
    y, state = mixer.extend(dirty, mixer.initial_state(3), padding_mask=mask)
    for row, kept in enumerate([slice(6, 20), slice(0, 13), slice(0, 20)]):
        alone, after = mixer.extend(x[row : row + 1, kept], mixer.initial_state(1))
        torch.testing.assert_close(y[row, kept], alone[0], **EXACT)
        torch.testing.assert_close(state.ssm[row], after.ssm[0], **EXACT)
        torch.testing.assert_close(state.conv[row], after.conv[0], **EXACT)
    assert not y[~mask].any()
    found = torch.autograd.grad(y.sum() + state.ssm.sum(), dirty)[0]
    assert found.isfinite().all()
    assert not found[~mask].any()


@pytest.mark.parametrize("example", ["default", "learnable_state"])
def test_a_donated_state_is_overwritten_in_place_and_gives_the_same(example: str) -> None:
    mixer, x = layer(example), tokens(2, 5)
    parameters = {name: parameter.clone() for name, parameter in mixer.named_parameters()}
    with torch.no_grad():
        kept, given = mixer.initial_state(2), mixer.initial_state(2)
        places = [leaf.data_ptr() for leaf in given.leaves().values()]
        for t in range(5):
            y, kept = mixer.extend(x[:, t : t + 1], kept)
            donated, given = mixer.extend(x[:, t : t + 1], given, donate=True)
            assert torch.equal(y, donated)
            assert [leaf.data_ptr() for leaf in given.leaves().values()] == places
    assert torch.equal(kept.ssm, given.ssm)
    assert torch.equal(kept.conv, given.conv)
    for name, parameter in mixer.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


def test_donating_under_autograd_keeps_gradients() -> None:
    mixer, x = layer(), tokens(1, 6).requires_grad_()
    state, outputs = mixer.initial_state(1), []
    for piece in x.split(2, dim=1):
        y, state = mixer.extend(piece, state, donate=True)
        outputs.append(y)
    ours = gradients(torch.cat(outputs, 1), {"x": x})["x"]
    torch.testing.assert_close(ours, gradients(mixer(x), {"x": x})["x"], **EXACT)


def test_learnt_initial_states_reach_every_sequence_and_get_gradients() -> None:
    mixer = layer("learnable_state")
    state = mixer.initial_state(3)
    assert torch.equal(state.ssm, mixer.init_states.expand(3, -1, -1, -1))
    (found,) = torch.autograd.grad(state.ssm.sum(), mixer.init_states)
    assert torch.equal(found, torch.full_like(found, 3.0))
    x = tokens(1, 4)
    with torch.no_grad():
        before = mixer(x, cu_seqlens=torch.tensor([0, 2, 4]))
        mixer.init_states.zero_()
        after = mixer(x, cu_seqlens=torch.tensor([0, 2, 4]))
    assert ((before - after).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_matrix_form_is_the_layer_and_has_the_structure_it_declares(example: str) -> None:
    mixer, x = layer(example), tokens(2, 33).requires_grad_()
    form = mixer.matrix_form(x)
    torch.testing.assert_close(form.apply(), mixer(x), **EXACT)
    wanted = {"x": x, **dict(mixer.named_parameters())}
    ours, theirs = gradients(form.apply(), wanted), gradients(mixer(x), wanted)
    for name in wanted:
        torch.testing.assert_close(ours[name], theirs[name], **EXACT)

    matrix, factors = form.matrix.detach(), form.factors
    assert matrix.shape[1] == form.n_heads == form.values.shape[2]
    assert not matrix.triu(1).any()
    torch.testing.assert_close(form.heads(slice(1, 3)), matrix[:, 1:3], **EXACT)
    assert factors is not None
    assert factors.skip is not None
    mask = factors.mask(slice(None)).detach()
    scores = torch.einsum("bihn,bjhn->bhij", factors.left, factors.right)
    torch.testing.assert_close(matrix, mask * scores + torch.diag_embed(factors.skip.transpose(1, 2)), **EXACT)
    torch.testing.assert_close(mask[..., 20, 7], mask[..., 20, 13] * mask[..., 13, 7], **EXACT)
    torch.testing.assert_close(mask.diagonal(dim1=2, dim2=3), torch.ones_like(mask[..., 0]), **EXACT)
    state_width = mixer.config.d_state
    for start in (5, 17, 28):
        singular = torch.linalg.svdvals(matrix[..., start:, :start])
        assert (singular[..., state_width:] <= 1e-10 * singular[..., :1]).all()


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("length", [64, 128])
def test_the_cost_is_what_torch_counts(example: str, length: int) -> None:
    mixer, x = layer(example), tokens(2, length)
    mixer.backend = "chunked"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(x)
    cost = mixer.cost(2, length, torch.float64)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert cost.parameters == sum(parameter.numel() for parameter in mixer.parameters())
    assert cost.state_elements == sum(leaf.numel() for leaf in mixer.initial_state(2).leaves().values())
    assert cost.bytes == 8 * (cost.parameters + 2 * x.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_states_keep_their_precision_in_low_precision_layers(dtype: torch.dtype) -> None:
    exact = layer("groups")
    mixer, x = layer("groups"), tokens(2, 70)
    mixer.load_state_dict(exact.state_dict())
    mixer = mixer.to(dtype)
    y, state = mixer.extend(x.to(dtype), mixer.initial_state(2))
    assert (y.dtype, state.conv.dtype, state.ssm.dtype) == (dtype, dtype, torch.float32)
    y, state = mixer.extend(x.to(dtype), state)
    truth = exact(torch.cat([x, x], 1))[:, 70:]
    assert (y.double() - truth).norm() / truth.norm() < 16 * torch.finfo(dtype).eps


def test_autocast_sets_the_output_dtype_and_keeps_the_state() -> None:
    mixer = layer().float()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer.extend(tokens(1, 9).float(), mixer.initial_state(1))
        y_again, state = mixer.extend(tokens(1, 1).float(), state)
    assert y.dtype == y_again.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32


@pytest.mark.parametrize("length", [1, 40])
def test_the_layer_compiles_without_graph_breaks(length: int) -> None:
    mixer, x = layer("learnable_state"), tokens(2, length)
    compiled: Callable[..., Any] = torch.compile(mixer.extend, fullgraph=True, backend="aot_eager")
    y, state = mixer.extend(x, mixer.initial_state(2))
    y_compiled, state_compiled = compiled(x, mixer.initial_state(2))
    torch.testing.assert_close(y, y_compiled, **EXACT)
    torch.testing.assert_close(state.ssm, state_compiled.ssm, **EXACT)


def test_initial_values_are_the_reference_implementations() -> None:
    torch.manual_seed(1)
    mixer = DEFINITION.make(SsdConfig(d_model=1024, head_dim=8, d_conv=3, conv_init=0.25, learnable_init_states=True))
    assert isinstance(mixer, SsdMixer)
    rates = mixer.A_log.exp()
    assert 1 <= rates.min() < 2
    assert 15 < rates.max() <= 16
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.999e-3 <= steps.min() < 1.5e-3
    assert 0.07 < steps.max() <= 0.1001
    assert abs(steps.log().mean().item() - math.log(1e-2)) < 0.3  # the middle of log 1e-3 and log 1e-1
    assert torch.equal(mixer.D, torch.ones(256))
    assert torch.equal(mixer.norm.weight, torch.ones(2048))
    assert not mixer.init_states.any()
    assert 0.24 < mixer.conv1d.weight.abs().max() <= 0.25
    floored = DEFINITION.make(SsdConfig(d_model=64, dt_min=1e-6, dt_max=2e-6, dt_init_floor=1e-3))
    assert isinstance(floored, SsdMixer)
    floors = torch.nn.functional.softplus(floored.dt_bias)
    torch.testing.assert_close(floors, torch.full_like(floors, 1e-3))


def test_parameters_are_named_and_shaped_as_mamba_ssm_has_them() -> None:
    shapes = {name: tuple(p.shape) for name, p in layer("part_mlp", n_groups=2, bias=True).named_parameters()}
    assert shapes == {
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "in_proj.weight": (2 * 128 + 2 * 2 * 16 + 4, 64),
        "in_proj.bias": (2 * 128 + 2 * 2 * 16 + 4,),
        "conv1d.weight": (64 + 2 * 2 * 16, 1, 4),
        "conv1d.bias": (64 + 2 * 2 * 16,),
        "norm.weight": (64,),
        "out_proj.weight": (64, 128),
        "out_proj.bias": (64,),
    }
    assert layer("skip_per_channel").D.shape == (32,)
    assert not [name for name, _ in layer("no_norm").named_parameters() if name.startswith("norm")]


@pytest.mark.parametrize("example", ["default", "learnable_state"])
def test_optimiser_hints_name_parameters_that_exist(example: str) -> None:
    mixer = layer(example)
    groups = mixer.parameter_groups()
    assert set(groups) <= {name for name, _ in mixer.named_parameters()}
    assert {"A_log", "D", "dt_bias"} <= set(groups)
    assert ("init_states" in groups) == (example == "learnable_state")
    assert all(hint == {"weight_decay": 0.0} for hint in groups.values())


@pytest.mark.parametrize("d_model", [64, 128, 192, 320])
def test_the_defaults_serve_multiples_of_64(d_model: int) -> None:
    mixer = DEFINITION.make(SsdConfig(d_model=d_model))
    assert mixer(torch.randn(1, 3, d_model)).shape == (1, 3, d_model)


def test_configs_round_trip_through_json_with_their_infinity() -> None:
    config = SsdConfig(d_model=64, dt_limit=(0.001, math.inf), d_ssm=64)
    text = config.model_dump_json()
    assert json.loads(text)["dt_limit"] == [0.001, "Infinity"]
    assert config.model_dump(mode="json") == json.loads(text)
    assert config.model_dump()["dt_limit"] == (0.001, math.inf)
    assert SsdConfig.model_validate_json(text) == config
    assert SsdConfig.model_validate(json.loads(text)) == config


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"head_dim": 48}, "expand . d_model = 128 is not a multiple of head_dim=48"),
        ({"d_ssm": 192}, "d_ssm=192 is more than the expanded width"),
        ({"d_ssm": 96}, "d_ssm = 96 is not a multiple of head_dim=64"),
        ({"n_groups": 3}, "the 2 heads do not divide into n_groups=3"),
        ({"norm_groups": 3}, "norm_groups=3 does not divide"),
        ({"rmsnorm": False, "norm_before_gate": True}, "norm_before_gate would have no effect"),
        ({"rmsnorm": False, "norm_groups": 2, "norm_eps": 1e-6}, "norm_groups, norm_eps would have no effect"),
        ({"dt_limit": (0.2, 0.1)}, "dt_limit=.*wanted 0 <= smallest <= largest"),
        ({"dt_limit": (math.nan, 0.1)}, "dt_limit"),
        ({"dt_limit": (0.0, 0.0)}, "largest above 0"),
        ({"dt_min": 0.5}, "dt_min=0.5 is above dt_max=0.1"),
        ({"a_init_range": (0.0, 1.0)}, "a_init_range"),
        ({"d_state": 16.0}, "integer"),
        ({"chunk_size": 64}, "Extra inputs"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused_in_words(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        SsdConfig.model_validate({"d_model": 64, **options})


def test_the_state_of_another_mixer_is_refused() -> None:
    class Strange(State):
        total: Tensor

    mixer = layer()
    with pytest.raises(StateError, match=r"Strange.*SsdState"):
        mixer.extend(tokens(1, 2), Strange(torch.zeros(1, 3)))
    with pytest.raises(ShapeError, match="initial_state"):
        mixer.extend(tokens(1, 2), layer("groups").initial_state(1))


def test_triton_is_declared_exactly_where_its_kernels_serve() -> None:
    assert (KERNEL_WIDEST, KERNEL_TAPS, KERNEL_NORM_GROUP) == (WIDEST, MAX_KERNEL_WIDTH, MAX_KERNEL_GROUP)

    def names(**options: Any) -> list[str]:
        return [spec.name for spec in capabilities_of(SsdConfig(**options)).backends]

    assert names(d_model=64) == ["triton", "chunked", "reference"]
    assert names(d_model=64, d_state=KERNEL_WIDEST + 1) == ["chunked", "reference"]
    assert names(d_model=64, d_conv=KERNEL_TAPS + 1) == ["chunked", "reference"]
    assert names(d_model=2 * KERNEL_NORM_GROUP) == ["chunked", "reference"]
    assert names(d_model=2 * KERNEL_NORM_GROUP, rmsnorm=False) == ["triton", "chunked", "reference"]


@pytest.mark.parametrize(
    ("peer", "config", "told"),
    [
        ("Mamba3", {"d_model": 64}, "did you mean Mamba2"),
        ("Mamba2", {"d_state": 64}, "argument 'd_model' is missing"),
        ("Mamba2", {"d_model": 64, "process_group": "world"}, "process_group='world' is not reproduced"),
        ("Mamba2", {"d_model": 64, "head_dim": 64}, "argument 'head_dim' is not known; did you mean headdim"),
        ("Mamba2", {"d_model": 64, "learnable_init_states": True}, "argument 'learnable_init_states' is not known"),
        ("Mamba2", {"d_model": 60}, "is not a multiple of head_dim=64"),
        ("Mamba2Simple", {"d_model": 64, "activation": "gelu"}, "activation='gelu' is not reproduced"),
        ("Mamba2Mixer", {"hidden_size": 64, "num_heads": 2, "n_groups": 1, "hidden_act": "relu"}, "hidden_act='relu'"),
        ("Mamba2Mixer", {"hidden_size": 64, "num_heads": 3, "n_groups": 1}, "num_heads=3 times head_dim=64 is 192"),
    ],
)
def test_an_option_of_a_reference_that_is_not_reproduced_is_refused(peer: str, config: Any, told: str) -> None:
    with pytest.raises(ReferenceMismatch, match=told):
        from_reference(peer, config, {})


def test_a_reference_left_to_its_defaults_is_read_with_them() -> None:
    assert from_reference("Mamba2", {"d_model": 64}, {})[0] == SsdConfig(d_model=64)
    simple = from_reference("Mamba2Simple", {"d_model": 64}, {})[0]
    assert simple == SsdConfig(d_model=64, d_state=64, head_dim=128, norm_groups=1)
    mixer = from_reference("Mamba2Mixer", {}, {})[0]
    assert mixer == SsdConfig(d_model=4096, n_groups=8)
    without = from_reference("Mamba2", {"d_model": 64, "rmsnorm": False, "norm_before_gate": True}, {})[0]
    assert without == SsdConfig(d_model=64, rmsnorm=False)

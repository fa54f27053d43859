"""The layers of S4 and S4D against their own equations, and what the contract asks of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops import cauchy
from zoo.ops.lti import triton_path

from layers import EXACT, PADS, agree, build, extend_in_pieces, padded, tokens, with_gradients
from sequence_mixer import UnsupportedCapability
from sequence_mixer.conformance.budget import relative_rms
from sequence_mixer.definition import Semiseparable
from sequence_mixer.errors import LengthError, StateError
from zoo_s4 import zoo_register_mixers
from zoo_s4.config import MOST_MODES, MOST_SUMS, S4Config, S4dConfig
from zoo_s4.layer import StateSpaceLayer
from zoo_s4.reference import s4_layer, s4d_layer
from zoo_s4.s4 import S4Mixer, S4State
from zoo_s4.s4d import S4dMixer

DEFINITIONS = {definition.name: definition for definition in zoo_register_mixers()}
CASES = [(name, key) for name, definition in DEFINITIONS.items() for key in definition.examples]
CAUSAL = [(name, key) for name, key in CASES if DEFINITIONS[name].examples[key].get("causal", True)]
BACKENDS = ["fft", "chunked", "reference"]


def layer(name: str, example: str = "default", backend: str = "auto") -> StateSpaceLayer:
    mixer = build(DEFINITIONS[name], example)
    assert isinstance(mixer, StateSpaceLayer)
    mixer.backend = backend
    return mixer


def equations(mixer: StateSpaceLayer, x: Tensor) -> Tensor:
    weights = dict(mixer.named_parameters())
    if isinstance(mixer.config, S4dConfig):
        return s4d_layer(mixer.config, weights, x)
    assert isinstance(mixer.config, S4Config)
    return s4_layer(mixer.config, weights, x)


def near(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Equal up to the conditioning of float64 gradients: a scaled C amplifies rounding where a mode hardly decays."""
    for a, b in zip(found, wanted, strict=True):
        assert relative_rms(a, b, 1e-3) < 1e-9


@pytest.mark.parametrize("length", [1, 67])
@pytest.mark.parametrize(("name", "example"), CASES)
def test_the_layer_equals_its_equations(name: str, example: str, length: int) -> None:
    mixer, x = layer(name, example), tokens(2, length).requires_grad_()
    cotangent = tokens(2, length)
    wanted = with_gradients(mixer, equations(mixer, x), x, cotangent=cotangent)
    for backend in BACKENDS:
        mixer.backend = backend
        found = with_gradients(mixer, mixer(x), x, cotangent=cotangent)
        near(found, wanted)


@pytest.mark.parametrize("causal", [True, False])
def test_relu_layers_equal_their_equations(causal: bool) -> None:
    """In float64 only: in a narrower dtype the rounding of a value near 0 may flip its slope, on every path."""
    mixer = S4dMixer(S4dConfig(d_model=6, d_state=8, activation="relu", causal=causal)).double()
    x, cotangent = tokens(2, 40, 6).requires_grad_(), tokens(2, 40, 6)
    near(
        with_gradients(mixer, mixer(x), x, cotangent=cotangent),
        with_gradients(mixer, equations(mixer, x), x, cotangent=cotangent),
    )


@pytest.mark.parametrize("init", ["legt", "lmu", "fout", "fourier2", "fourier_decay", "legs+fout+legt"])
@torch.no_grad()
def test_measures_without_damping_of_their_own_are_served(init: str) -> None:
    """Re a is 1e-4 at the start, all damping is in P: outputs agree; a scaled C costs gradients of a digits here."""
    config = S4Config(d_model=6, d_state=8, init=init, rank=2, kernel_length=32)
    mixer, x = S4Mixer(config).double(), tokens(2, 40, 6)
    wanted = equations(mixer, x)
    for backend in BACKENDS:
        mixer.backend = backend
        assert relative_rms(mixer(x), wanted) < 1e-9
    mixer.backend = "auto"
    assert relative_rms(extend_in_pieces(mixer, x, [1, 30, 9])[0], wanted) < 1e-9


@pytest.mark.parametrize("sizes", [[1] * 6, [5, 1, 6]], ids=str)
@pytest.mark.parametrize(("name", "example"), CAUSAL)
def test_extending_in_pieces_equals_the_whole(name: str, example: str, sizes: list[int]) -> None:
    mixer, x = layer(name, example), tokens(2, sum(sizes)).requires_grad_()
    pieces, state = extend_in_pieces(mixer, x, sizes)
    cotangent = tokens(2, sum(sizes))
    found = with_gradients(mixer, pieces, x, cotangent=cotangent)
    near(found, with_gradients(mixer, mixer(x), x, cotangent=cotangent))
    with torch.no_grad():
        again, stepped = extend_in_pieces(mixer, x, sizes)
    torch.testing.assert_close(again, pieces, **EXACT)
    torch.testing.assert_close(stepped.ssm, state.ssm, **EXACT)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_old_states_stay_valid_unless_donated(name: str) -> None:
    mixer, x = layer(name), tokens(2, 9)
    state = mixer.extend(x[:, :5], mixer.initial_state(2))[1].detach()
    kept = state.ssm.clone()
    y, _ = mixer.extend(x[:, 5:], state)
    assert torch.equal(y, mixer.extend(x[:, 5:], state)[0])
    leaf = type(state)(*[part.requires_grad_() if key == "ssm" else part for key, part in state.leaves().items()])
    grown, after = mixer.extend(x[:, 5:], leaf, donate=True)
    assert torch.equal(state.ssm, kept)
    (gradient,) = torch.autograd.grad(grown.square().sum() + after.ssm.square().sum(), [leaf.ssm])
    assert bool((gradient != 0).all())
    with torch.no_grad():
        given = state.detach()
        donated, after = mixer.extend(x[:, 5:6], given, donate=True)
    torch.testing.assert_close(donated, y[:, :1], **EXACT)
    assert after.ssm.data_ptr() == given.ssm.data_ptr()
    with pytest.raises(StateError, match="wanted the S4"):
        mixer.extend(x, build_other(name).initial_state(2))


def build_other(name: str) -> StateSpaceLayer:
    return layer("s4d" if name == "s4" else "s4")


@torch.no_grad()
def test_rows_of_zeros_are_sequences_without_a_past() -> None:
    """A pool of states begins as zeros; whichever row holds them, the other rows keep their outputs."""
    mixer, x = layer("s4", "rank_2"), tokens(3, 9, 64)
    _, state = mixer.extend(x, mixer.initial_state(3))
    pool = state.map(lambda leaf: torch.cat([torch.zeros_like(leaf[:1]), leaf]))
    for count in (1, 4):
        more = tokens(3, count, 64)
        y, _ = mixer.extend(torch.cat([more[:1], more]), pool)
        torch.testing.assert_close(y[1:], mixer.extend(more, state)[0], **EXACT)
        torch.testing.assert_close(y[:1], mixer(more[:1]), **EXACT)
    with pytest.raises(StateError, match=r"state\.readout holds zeros.*initial_state"):
        mixer.extend(x, state.map(torch.zeros_like))


def test_states_carried_over_optimiser_steps_read_the_new_parameters() -> None:
    """Truncated back-propagation: with gradients on, nothing that the state brought stands in for a parameter."""
    mixer, x = layer("s4"), tokens(1, 6)
    state = mixer.extend(x, mixer.initial_state(1))[1].detach()
    with torch.no_grad():
        mixer.C.mul_(2.0)
    grown = mixer.extend(x, state)[0]
    fresh = S4State(state.ssm, mixer.initial_state(1).readout)
    torch.testing.assert_close(grown, mixer.extend(x, fresh)[0], **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(mixer.extend(x, fresh)[0], grown, **EXACT)


@pytest.mark.parametrize(("name", "example"), CASES)
def test_packed_sequences_do_not_meet(name: str, example: str) -> None:
    mixer = layer(name, example)
    pieces = [tokens(1, length).requires_grad_() for length in (3, 0, 70, 1, 0)]
    cu = torch.tensor([0, 3, 3, 73, 74, 74], dtype=torch.int32)
    cotangent = tokens(1, 74)
    separate = torch.cat([mixer(piece) for piece in pieces], 1)
    wanted = with_gradients(mixer, separate, *pieces, cotangent=cotangent)
    for backend in BACKENDS:
        mixer.backend = backend
        found = with_gradients(mixer, mixer(torch.cat(pieces, 1), cu_seqlens=cu), *pieces, cotangent=cotangent)
        near(found, wanted)


@pytest.mark.parametrize("name", ["s4", "s4d"])
def test_kernels_are_as_long_as_the_longest_sequence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as long as a packed row, nor as all rows of a padded batch together."""
    mixer, x, asked = layer(name, backend="fft"), tokens(4, 40, 64), []
    plain = mixer.kernel
    monkeypatch.setattr(mixer, "kernel", lambda length: asked.append(length) or plain(length))
    mixer(x.flatten(0, 1).unsqueeze(0), cu_seqlens=torch.tensor([0, 30, 30, 100, 160]))
    mixer(x, padding_mask=torch.arange(40) < torch.tensor([[40], [0], [7], [25]]))
    assert asked == [70, 40]


@pytest.mark.parametrize(("name", "example"), CAUSAL)
def test_packed_sequences_extend_their_own_rows(name: str, example: str) -> None:
    mixer, lengths = layer(name, example), [2, 0, 5]
    past, pieces = [tokens(1, 4) for _ in lengths], [tokens(1, length) for length in lengths]
    state = mixer.extend(torch.cat(past), mixer.initial_state(3))[1]
    y, after = mixer.extend(torch.cat(pieces, 1), state, cu_seqlens=torch.tensor([0, 2, 2, 7]))
    whole = [torch.cat(both, 1) for both in zip(past, pieces, strict=True)]
    torch.testing.assert_close(y, torch.cat([mixer(row)[:, 4:] for row in whole], 1), **EXACT)
    alone = torch.cat([mixer.extend(row, mixer.initial_state(1))[1].ssm for row in whole])
    torch.testing.assert_close(after.ssm, alone, **EXACT)


@pytest.mark.parametrize(("name", "example"), CASES)
def test_padding_changes_nothing_and_comes_out_as_zero(name: str, example: str) -> None:
    mixer = layer(name, example)
    rows = [tokens(1, 12 - left - right)[0].requires_grad_() for left, right in PADS]
    x, mask = padded(rows, PADS)
    y = mixer(x, padding_mask=mask)
    assert bool((y[~mask] == 0).all())
    torch.testing.assert_close(y[mask], torch.cat([mixer(row[None])[0] for row in rows]), **EXACT)


@pytest.mark.parametrize(("name", "example"), CASES)
def test_the_matrix_form_is_the_layer_and_has_the_declared_structure(name: str, example: str) -> None:
    mixer, x = layer(name, example), tokens(2, 40)
    form = mixer.matrix_form(x)
    torch.testing.assert_close(form.apply(), mixer(x), **EXACT)
    matrix = form.heads(slice(0, 3))
    assert form.n_heads == 64 * mixer.config.channels
    assert torch.equal(matrix[:, :, 1:, 1:], matrix[:, :, :-1, :-1])
    (rank,) = [kind.rank for kind in mixer.capabilities.structures if isinstance(kind, Semiseparable)]
    assert int(torch.linalg.matrix_rank(matrix[..., 20:, :20], rtol=1e-10).max()) <= rank
    assert bool((matrix.triu(1) == 0).all()) == mixer.config.causal


@pytest.mark.parametrize(("name", "example"), CASES)
def test_the_cost_is_what_torch_counts(name: str, example: str) -> None:
    mixer = layer(name, example).float()
    cost = mixer.cost(2, 64, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(tokens(2, 64).float())
    assert abs(counter.get_total_flops() / cost.flops - 1) < 0.15
    assert cost.parameters == sum(parameter.numel() for parameter in mixer.parameters())
    held = sum(leaf.numel() for leaf in mixer.initial_state(2).leaves().values()) if mixer.config.causal else 0
    assert cost.state_elements == held


def test_looking_ahead_in_packed_rows_compiles_whole() -> None:
    torch._dynamo.reset()
    mixer, x = layer("s4", "bidirectional"), tokens(1, 12)
    mixer.backend = "chunked"
    options: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 5, 5, 12])}
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, **options), mixer(x, **options), **EXACT)


@torch.no_grad()
def test_a_decode_step_compiles_whole() -> None:
    torch._dynamo.reset()
    mixer, x = layer("s4"), tokens(2, 4)
    extend = torch.compile(mixer.extend, backend="aot_eager", fullgraph=True)
    state = mixer.extend(x, mixer.initial_state(2))[1]
    y, after = extend(x[:, :1], state)
    wanted, wanted_after = mixer.extend(x[:, :1], state)
    agree([y, after.ssm], [wanted, wanted_after.ssm])


@pytest.mark.parametrize(("name", "example"), [("s4", "default"), ("s4d", "default"), ("s4d", "many_inits")])
def test_autocast_gives_its_dtype_and_keeps_the_state_wide(name: str, example: str) -> None:
    mixer, x = layer(name, example).float(), tokens(2, 70).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
        pieces, state = extend_in_pieces(mixer, x, [40, 1, 29])
    assert y.dtype == pieces.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    assert relative_rms(y, mixer(x)) < 2e-2
    assert relative_rms(pieces, y) < 1e-2
    half = mixer.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.initial_state(1).ssm.dtype == torch.float32


def test_a_longer_kernel_is_derived_and_changes_no_buffer_and_no_parameter() -> None:
    mixer = S4Mixer(S4Config(d_model=8, d_state=8, kernel_length=16)).double()
    before = copy.deepcopy(mixer.state_dict())
    long = mixer.kernel(100)
    for length in (1, 15, 16, 17, 32, 33, 99):
        torch.testing.assert_close(mixer.kernel(length), long[..., :length], rtol=1e-10, atol=1e-12)
    assert all(torch.equal(mixer.state_dict()[key], value) for key, value in before.items())
    assert list(mixer.buffers()) == []


def test_odd_kernel_lengths_have_no_node_at_the_nyquist_frequency() -> None:
    torch.manual_seed(1)
    even = S4Mixer(S4Config(d_model=4, d_state=8, kernel_length=16))
    torch.manual_seed(1)
    odd = S4Mixer(S4Config(d_model=4, d_state=8, kernel_length=17))
    torch.testing.assert_close(even.kernel(40), odd.kernel(40), rtol=1e-4, atol=1e-5)


def test_hints_slow_the_system_down_and_keep_decay_off_it() -> None:
    groups = layer("s4").parameter_groups()
    assert set(groups) == {"inv_dt", "A_real", "A_imag", "B", "P"}
    assert all(hint == {"weight_decay": 0.0, "lr_scale": 0.25} for hint in groups.values())
    assert layer("s4", "rank_2").parameter_groups()["P"]["lr_scale"] == 0.1
    assert "P" not in layer("s4d").parameter_groups()
    assert "A_imag" not in layer("s4d", "real").parameter_groups()
    assert "B" not in layer("s4d", "minimal").parameter_groups()


def test_backends_are_those_that_serve_the_config() -> None:
    names = lambda config: [spec.name for spec in DEFINITIONS[config.name].capabilities_of(config).backends]
    plain = ["fft", "chunked", "reference"]
    assert names(S4Config(d_model=64, rank=3, channels=13)) == ["triton", *plain]
    assert names(S4Config(d_model=64, rank=3, channels=14)) == plain
    assert names(S4dConfig(d_model=64, d_state=256)) == ["triton", *plain]
    assert names(S4dConfig(d_model=64, d_state=256, init="real", real=True)) == plain
    assert (MOST_SUMS, MOST_MODES) == (cauchy.MOST_SUMS, triton_path.MOST_MODES)


def test_bad_configs_and_calls_are_refused_in_words() -> None:
    for kind, given, said in (
        (S4dConfig, {"d_state": 7}, "d_state=7 is odd"),
        (S4dConfig, {"n_ssm": 3}, "n_ssm=3 does not divide d_model=64"),
        (S4dConfig, {"init": "lin+real+inv"}, "do not divide 64"),
        (S4dConfig, {"init": "linear"}, "no system 'linear'"),
        (S4dConfig, {"dt_min": 1.0}, "dt_min=1.0 is above dt_max=0.1"),
        (S4dConfig, {"output": "none", "channels": 2}, "need an output map"),
        (S4dConfig, {"output": "none", "bias": False}, "no effect"),
        (S4dConfig, {"real": True, "bandlimit": 0.5}, "bandlimit would have no effect"),
        (S4dConfig, {"real": True}, "the modes of init='legs' are all alike; wanted init='real'"),
        (S4dConfig, {"real": True, "imag_transform": "exp"}, "imag_transform would have no effect"),
        (S4dConfig, {"rank": 1}, "rank"),
        (S4Config, {"init": "legt"}, "needs rank=2, got 1"),
        (S4Config, {"rank": 4}, "less than or equal to 3"),
        (S4Config, {"d_state": 7}, "d_state=7 is odd"),
        (S4Config, {"disc": "zoh"}, "disc"),
    ):
        with pytest.raises(ValidationError, match=said):
            kind(d_model=64, **given)
    with pytest.raises(UnsupportedCapability, match="stateful"):
        layer("s4", "bidirectional").extend(tokens(1, 3), None)
    with pytest.raises(LengthError, match="max_length is 160"):
        layer("s4d", "many_inits")(tokens(1, 161))

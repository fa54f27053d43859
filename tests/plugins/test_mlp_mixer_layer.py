"""The token-mixing layer of MLP-Mixer: its equations, padding, secant matrix, recorded layers, and what it refuses."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.dispatch import record_dispatch
from zoo.ops.token_mlp import ACTIVATIONS

from golden import load_case
from layers import EXACT, FLOAT64, PADS, agree, build, expect_recorded, from_case, padded, tokens, with_gradients
from sequence_mixer.conformance.budget import relative_rms
from sequence_mixer.definition import Dense, LowRank
from sequence_mixer.errors import LengthError, ReferenceMismatch, UnsupportedCapability
from zoo_mlp_mixer import EXAMPLES, zoo_register_mixers
from zoo_mlp_mixer.config import MlpMixerConfig
from zoo_mlp_mixer.from_reference import BLOCK, INNER, convert
from zoo_mlp_mixer.mixer import MlpMixer
from zoo_mlp_mixer.reference import mlp_mixer_layer
from zoo_mlp_mixer.secant import gelu_slope, secant_slope

DEFINITION = zoo_register_mixers()[0]
CAUSAL = [key for key in EXAMPLES if EXAMPLES[key].get("causal", False)]


def layer(example: str = "default", backend: str = "auto") -> MlpMixer:
    mixer = build(DEFINITION, example)
    assert isinstance(mixer, MlpMixer)
    mixer.backend = backend
    return mixer


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("length", [1, 7, 67, 100])
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_layer_equals_its_equations(example: str, length: int, backend: str):
    mixer, x = layer(example, backend), tokens(2, length).requires_grad_()
    cotangent = tokens(2, length)
    wanted = mlp_mixer_layer(mixer.config, dict(mixer.named_parameters()), x)
    agree(
        with_gradients(mixer, mixer(x), x, cotangent=cotangent),
        with_gradients(mixer, wanted, x, cotangent=cotangent),
    )


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_padding_changes_nothing_and_comes_out_as_zero(example: str, backend: str):
    mixer = layer(example, backend)
    rows = [tokens(1, 12 - left - right)[0].requires_grad_() for left, right in PADS]
    x, mask = padded(rows, PADS)
    y = mixer(x, padding_mask=mask)
    assert bool((y[~mask] == 0).all())
    wanted = torch.cat([mixer(row[None])[0] for row in rows])
    cotangent = tokens(1, wanted.shape[0])[0]
    agree(
        with_gradients(mixer, y[mask], *rows, cotangent=cotangent),
        with_gradients(mixer, wanted, *rows, cotangent=cotangent),
    )


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_matrix_form_is_the_layer_and_has_the_declared_structure(example: str):
    mixer, x = layer(example), tokens(2, 60)
    form = mixer.matrix_form(x)
    torch.testing.assert_close(form.apply(), mixer(x), **EXACT)
    assert form.n_heads == 64
    some = form.heads(slice(5, 8))
    torch.testing.assert_close(form.matrix[:, 5:8], some, **EXACT)
    (structure,) = mixer.capabilities.structures
    if mixer.config.causal:
        assert structure == Dense()
        assert bool((some.triu(1) == 0).all())
    else:
        assert structure == LowRank(mixer.config.hidden)
        ranks = torch.linalg.matrix_rank(some, rtol=1e-10)
        assert set(ranks.flatten().tolist()) == {min(60, mixer.config.hidden)}


@pytest.mark.parametrize("example", EXAMPLES)
def test_finish_adds_what_an_input_of_zeros_gives_and_nothing_of_the_input(example: str):
    mixer = layer(example)
    zero = torch.zeros(1, 9, 64, dtype=torch.float64)
    form = mixer.matrix_form(tokens(1, 9))
    finished = form.finish(torch.zeros(1, 9, 64, 1, dtype=torch.float64))
    if not mixer.config.pre_norm:
        torch.testing.assert_close(finished, mixer(zero), **EXACT)
    other = mixer.matrix_form(tokens(1, 9)).finish(torch.zeros(1, 9, 64, 1, dtype=torch.float64))
    assert torch.equal(finished, other) == (not mixer.config.residual)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_the_secant_is_exact_far_from_zero_and_smooth_at_zero(approximate: str):
    gelu = lambda a: torch.nn.functional.gelu(a, approximate=approximate)
    z = torch.tensor([0.0, 1e-300, 1e-12, -1e-7, 5e-6, -7e-6, 1e-4, -0.3, 2.0, 40.0, -40.0], dtype=torch.float64)
    bias = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    slope = secant_slope(z, bias, approximate)
    torch.testing.assert_close(slope * z, gelu(bias + z) - gelu(bias), rtol=1e-9, atol=2e-15)
    torch.testing.assert_close(slope[:, 0], gelu_slope(bias, approximate)[:, 0], rtol=1e-14, atol=0)
    smooth = gelu_slope(bias + z[:7] / 2, approximate)
    torch.testing.assert_close(slope[:, :7], smooth, rtol=0, atol=1e-9)
    free = torch.linspace(-4, 4, 9, dtype=torch.float64)
    wanted = torch.where(free == 0, 0.5, gelu(free) / free)
    torch.testing.assert_close(secant_slope(free, torch.zeros_like(free), approximate), wanted)


@pytest.mark.parametrize("example", CAUSAL)
def test_triangular_weights_hide_the_future(example: str):
    mixer, x = layer(example), tokens(2, 40)
    y = mixer(x)
    later = torch.cat([x[:, :17], 100 * tokens(2, 23)], 1)
    assert torch.equal(mixer(later)[:, :17], y[:, :17])
    torch.testing.assert_close(mixer(x[:, :17]), y[:, :17], **EXACT)
    assert not torch.equal(mixer(torch.cat([tokens(2, 1), x[:, 1:]], 1))[:, 39], y[:, 39])


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_cost_is_what_torch_counts(example: str):
    mixer = layer(example).float()
    cost = mixer.cost(2, 96, torch.float32)
    with FlopCounterMode(display=False) as counter:
        mixer(tokens(2, 96).float())
    assert counter.get_total_flops() == cost.flops
    assert cost.parameters == sum(parameter.numel() for parameter in mixer.parameters())
    assert cost.bytes == (cost.parameters + 2 * 2 * 96 * 64) * 4
    assert cost.state_elements == 0


def test_initial_weights_are_lecun_normal_with_zero_biases():
    torch.manual_seed(3)
    mixer = DEFINITION.make(MlpMixerConfig(d_model=64, max_length=400, tokens_dim=900))
    for layer_of, fan_in in ((mixer.mlp_tokens.fc1, 400), (mixer.mlp_tokens.fc2, 900)):  # type: ignore[union-attr]
        weight = layer_of.weight.detach() * fan_in**0.5
        assert abs(float(weight.std()) - 1) < 0.01
        assert abs(float(weight.abs().max()) - 2 / 0.8796) < 0.01
        assert not layer_of.bias.any()


def test_autocast_gives_its_dtype_with_norm_and_residual():
    mixer, x = layer("whole_block").float(), tokens(2, 30).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert y.dtype == torch.bfloat16
    assert relative_rms(y, mixer(x)) < 1e-2
    wide = layer("whole_block")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide(x.double()), wide(x.double()))
        assert wide(x.double()).dtype == torch.float64


def test_the_operator_is_called_with_the_backend_of_the_mixer():
    with record_dispatch() as record:
        layer("plain", "reference")(tokens(1, 5))
    assert [(each.op, each.backend) for each in record] == [("token_mlp", "reference")]


def test_the_config_and_the_operator_know_the_same_activations():
    field = MlpMixerConfig.model_fields["activation"]
    assert set(field.annotation.__args__) == set(ACTIVATIONS)  # type: ignore[union-attr]
    assert {example.get("activation", field.default) for example in EXAMPLES.values()} == set(ACTIVATIONS)


def test_hidden_units_follow_the_width_or_the_length():
    for width, hidden in ((512, 256), (768, 384), (1024, 512), (1280, 640), (1, 1)):  # S, B, L, H of the paper
        assert MlpMixerConfig(d_model=width).hidden == hidden
    assert MlpMixerConfig(d_model=512, max_length=77, causal=True).hidden == 77


def test_bad_configs_and_calls_are_refused_in_words():
    for given, said in (
        ({"causal": True, "tokens_dim": 8}, "must be max_length=1024"),
        ({"activation": "relu"}, "gelu_erf"),
        ({"tokens_dim": 0}, "greater than 0"),
        ({"norm_eps": 0.0}, "greater than 0"),
        ({"norm_eps": 1e-5}, "no effect with pre_norm=False"),
        ({"tokens_dims": 4}, "tokens_dims"),
    ):
        with pytest.raises(ValidationError, match=said):
            MlpMixerConfig(**{"d_model": 64, **given})
    with pytest.raises(LengthError, match="max_length is 100"):
        layer("plain")(tokens(1, 101))
    for example in ("default", "causal"):
        with pytest.raises(UnsupportedCapability, match="stateful"):
            layer(example).extend(tokens(1, 3), None)
        with pytest.raises(UnsupportedCapability, match="varlen"):
            layer(example)(tokens(1, 3), cu_seqlens=torch.tensor([0, 3]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("name", ["mlp_mixer_token", "mlp_mixer_token_tanh"])
def test_recorded_layers_come_back(name: str, backend: str, dtype: torch.dtype):
    case = load_case(name)
    mixer = from_case("mlp_mixer", case, dtype)
    mixer.backend = backend
    expect_recorded(case, mixer, dtype, {key: (key, slice(None)) for key in case.parameters()})


@pytest.mark.parametrize("name", ["mlp_mixer_token", "mlp_mixer_token_tanh"])
def test_the_recorded_mlp_alone_comes_back(name: str):
    import zoo

    case = load_case(name)
    inner = {key.removeprefix("mlp_tokens."): w for key, w in case.parameters().items() if key.startswith("mlp")}
    mixer, x = zoo.from_reference("mlp_mixer", INNER, case.config, inner), case.tensors["x"].requires_grad_()
    y = mixer(x)
    assert relative_rms(y, case.tensors["y_mlp"]) < FLOAT64
    (y * case.tensors["w"]).sum().backward()
    assert x.grad is not None
    assert relative_rms(x.grad, case.tensors["grad_x_mlp"]) < FLOAT64


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"act": "relu"}, "act='relu' is not reproduced"),
        ({"drop": 0.1}, "drop=0.1"),
        ({"drop_path": 0.1}, "drop_path=0.1"),
        ({"norm": "BatchNorm"}, "norm='BatchNorm'"),
        ({"norm": "LayerNorm(eps=0)"}, "norm_eps"),
        ({"mlp_layer": "GluMlp"}, "'mlp_layer' is not known"),
        ({"tokens_dim": 0}, "tokens_dim"),
    ],
)
def test_options_that_we_lack_are_refused(changes: dict[str, Any], said: str):
    given = {"dim": 8, "seq_len": 6, "norm": "LayerNorm(eps=1e-05)"}
    weights: dict[str, Tensor] = {"norm1.weight": torch.ones(8), "norm1.bias": torch.zeros(8)}
    for number, (rows, columns) in ((1, (4, 6)), (2, (6, 4))):
        weights[f"mlp_tokens.fc{number}.weight"] = torch.zeros(rows, columns)
        weights[f"mlp_tokens.fc{number}.bias"] = torch.zeros(rows)
    config, named = convert(BLOCK, given, weights)
    assert (config.hidden, config.activation, config.norm_eps) == (4, "gelu_erf", 1e-5)
    assert (config.pre_norm, config.residual) == (True, True)
    DEFINITION.make(config).load_state_dict(named)
    assert convert(BLOCK, {**given, "mlp_ratio": (1.0, 4.0)}, weights)[0].hidden == 8
    with pytest.raises(ReferenceMismatch, match=said):
        convert(BLOCK, given | changes, weights)
    with pytest.raises(ReferenceMismatch, match=r"not known: mlp_channels.fc1.weight"):
        convert(BLOCK, given, weights | {"mlp_channels.fc1.weight": torch.zeros(8, 8)})
    with pytest.raises(ReferenceMismatch, match=r"missing: fc1.weight"):
        convert(INNER, given, weights)
    with pytest.raises(ReferenceMismatch, match=r"MixerBlock\.mlp_tokens"):
        convert("Mixer", given, weights)

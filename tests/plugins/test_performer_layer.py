"""The Performer layer against its own equations, recorded layers, and what the contract asks of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.favor_attention import FEATURES, feature_epsilon
from zoo.ops.favor_attention.triton_path import WIDEST

from golden import load_case
from layers import (
    EXACT,
    PADS,
    agree,
    build,
    extend_in_pieces,
    padded,
    recorded_allowance,
    tokens,
    with_gradients,
)
from sequence_mixer import UnsupportedCapability
from sequence_mixer.conformance.budget import relative_rms
from sequence_mixer.definition import LowRank, RowStochastic, Semiseparable
from sequence_mixer.errors import ReferenceMismatch
from zoo_performer import EXAMPLES, KERNEL_WIDEST, zoo_register_mixers
from zoo_performer.config import PerformerConfig
from zoo_performer.from_reference import convert
from zoo_performer.mixer import PerformerMixer, PerformerState
from zoo_performer.reference import performer_layer

DEFINITION = zoo_register_mixers()[0]
CAUSAL = [key for key in EXAMPLES if EXAMPLES[key].get("causal", True)]


def layer(example: str = "default", backend: str = "auto") -> PerformerMixer:
    mixer = build(DEFINITION, example)
    assert isinstance(mixer, PerformerMixer)
    mixer.backend = backend
    return mixer


def weights_of(mixer: PerformerMixer) -> dict[str, Tensor]:
    return dict(mixer.named_parameters()) | dict(mixer.named_buffers())


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("length", [1, 7, 67])
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_layer_equals_its_equations(example: str, length: int, backend: str):
    mixer, x = layer(example, backend), tokens(2, length).requires_grad_()
    cotangent = tokens(2, length)
    wanted = performer_layer(mixer.config, weights_of(mixer), x)
    agree(
        with_gradients(mixer, mixer(x), x, cotangent=cotangent),
        with_gradients(mixer, wanted, x, cotangent=cotangent),
    )


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 1, 6], [12]], ids=str)
@pytest.mark.parametrize("example", CAUSAL)
def test_extending_in_pieces_equals_the_whole(example: str, sizes: list[int]):
    mixer, x = layer(example), tokens(2, 12).requires_grad_()
    pieces, state = extend_in_pieces(mixer, x, sizes)
    cotangent = tokens(2, 12)
    agree(
        with_gradients(mixer, pieces, x, cotangent=cotangent), with_gradients(mixer, mixer(x), x, cotangent=cotangent)
    )
    whole = mixer.extend(x, mixer.initial_state(2))[1]
    torch.testing.assert_close(state.sums, whole.sums, **EXACT)


def test_old_states_stay_valid_and_carry_gradients():
    mixer, x = layer("grouped"), tokens(2, 9)
    state = mixer.extend(x[:, :5], mixer.initial_state(2))[1].detach()
    leaf = PerformerState(state.sums.requires_grad_())
    kept = state.sums.detach().clone()
    y, after = mixer.extend(x[:, 5:], leaf, donate=True)
    again = mixer.extend(x[:, 5:], leaf)[0]
    assert torch.equal(y, again)
    assert torch.equal(state.sums, kept)
    (gradient,) = torch.autograd.grad(y.square().sum() + after.sums.square().sum(), [leaf.sums])
    assert bool((gradient[..., :-1] != 0).all())
    assert bool((gradient[..., -1] == 0).all())  # the running maximum is a scale that cancels


@pytest.mark.parametrize("example", EXAMPLES)
def test_packed_sequences_do_not_meet(example: str):
    mixer = layer(example)
    pieces = [tokens(1, length).requires_grad_() for length in (3, 0, 70, 1, 0)]
    cu = torch.tensor([0, 3, 3, 73, 74, 74], dtype=torch.int32)
    cotangent = tokens(1, 74)
    separate = torch.cat([mixer(piece) for piece in pieces], 1)
    agree(
        with_gradients(mixer, mixer(torch.cat(pieces, 1), cu_seqlens=cu), *pieces, cotangent=cotangent),
        with_gradients(mixer, separate, *pieces, cotangent=cotangent),
    )


@pytest.mark.parametrize("example", EXAMPLES)
def test_padding_changes_nothing_and_comes_out_as_zero(example: str):
    mixer = layer(example)
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
    mixer, x = layer(example), tokens(2, 140)
    form = mixer.matrix_form(x)
    torch.testing.assert_close(form.apply(), mixer(x), **EXACT)
    matrix = form.matrix
    torch.testing.assert_close(form.heads(slice(0, 1)), matrix[:, :1], **EXACT)
    rank = torch.linalg.matrix_rank
    for structure in mixer.capabilities.structures:
        if isinstance(structure, LowRank):
            assert int(rank(matrix, rtol=1e-10).max()) <= structure.rank
        elif isinstance(structure, Semiseparable):
            assert int(rank(matrix[..., 70:, :70], rtol=1e-10).max()) <= structure.rank
        else:
            assert isinstance(structure, RowStochastic)
            assert bool((matrix >= 0).all())
            torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]), rtol=0, atol=1e-12)
    assert bool((matrix.triu(1) == 0).all()) == mixer.config.causal


def test_rows_sum_to_one_unless_an_epsilon_takes_its_share():
    promised = {key for key in EXAMPLES if RowStochastic() in layer(key).capabilities.structures}
    assert promised == {"default", "hyperbolic", "bidirectional", "bidirectional_relu", "jax"}
    assert RowStochastic() not in DEFINITION.capabilities_of(
        PerformerConfig(d_model=64, feature_map="relu", feature_eps=0.0)
    ).structures  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_cost_is_what_torch_counts(example: str):
    mixer = layer(example).float()
    cost = mixer.cost(2, 192, torch.float32)
    with FlopCounterMode(display=False) as counter:
        mixer(tokens(2, 192).float())
    assert abs(counter.get_total_flops() / cost.flops - 1) < 0.01
    assert cost.parameters == sum(parameter.numel() for parameter in mixer.parameters())
    assert cost.bytes == (cost.parameters + 2 * 2 * 192 * 64) * 4
    assert cost.state_elements == (mixer.initial_state(2).sums.numel() if mixer.config.causal else 0)


def test_the_projection_is_drawn_anew_every_interval_from_the_generator_alone():
    mixer = DEFINITION.make(PerformerConfig(d_model=64, n_features=10, redraw_interval=3))
    assert "projection" in mixer.state_dict()
    assert "projection" not in dict(mixer.named_parameters())
    x = tokens(1, 3).float()
    seen, before = [mixer.projection.clone()], torch.get_rng_state()
    generator = torch.Generator().manual_seed(2)
    for step in range(1, 8):
        mixer.after_step(step, generator)
        mixer(x)
        seen.append(mixer.projection.clone())
    assert torch.equal(torch.get_rng_state(), before)
    changed = [step for step in range(1, 8) if not torch.equal(seen[step], seen[step - 1])]
    assert changed == [3, 6]
    again = DEFINITION.make(PerformerConfig(d_model=64, n_features=10, redraw_interval=3))
    again.after_step(3, torch.Generator().manual_seed(2))
    assert torch.equal(again.projection, seen[3])
    kept = DEFINITION.make(PerformerConfig(d_model=64, n_features=10, redraw_interval=None))
    first = kept.projection.clone()
    kept.after_step(1000, generator)
    assert torch.equal(kept.projection, first)


@pytest.mark.parametrize("example", ["grouped", "jax"])
def test_calls_compile_whole(example: str):
    torch._dynamo.reset()
    mixer, x = layer(example), tokens(1, 4)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    options = {"padding_mask": torch.arange(4) < torch.tensor([[3]])}
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, **options), mixer(x, **options), **EXACT)


def test_autocast_gives_its_dtype_and_keeps_the_state_wide():
    mixer, x = layer("grouped").float(), tokens(2, 70).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
        pieces, state = extend_in_pieces(mixer, x, [40, 1, 29])
    assert y.dtype == pieces.dtype == torch.bfloat16
    assert state.sums.dtype == torch.float32
    assert relative_rms(y, mixer(x)) < 3e-2
    assert relative_rms(pieces, y) < 1e-2
    half = mixer.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.initial_state(1).sums.dtype == torch.float32


def test_the_config_and_the_operator_agree_on_features_and_epsilons():
    assert set(FEATURES) == {example.get("feature_map", "positive") for example in EXAMPLES.values()}
    assert KERNEL_WIDEST == WIDEST
    for causal, kind, compat in ((True, "relu", None), (False, "positive", "jax"), (True, "hyperbolic", None)):
        for given in (None, 0.5) if kind == "relu" or compat else (None, 0.0):
            config = PerformerConfig(d_model=64, causal=causal, feature_map=kind, compat=compat, feature_eps=given)
            assert config.added_to_features == feature_epsilon(kind, given, compat, causal)


def test_backends_are_those_that_serve_the_config():
    names = lambda **given: [
        spec.name for spec in DEFINITION.capabilities_of(PerformerConfig(d_model=1024, **given)).backends
    ]
    assert names() == names(causal=False) == ["triton", "chunked", "reference"]
    assert names(causal=False, compat="jax") == ["chunked", "reference"]
    assert names(n_heads=2) == ["chunked", "reference"]


def test_bad_configs_and_calls_are_refused_in_words():
    for given, said in (
        ({"n_heads": 3}, "not a multiple of n_heads=3"),
        ({"n_heads": 4, "n_kv_heads": 3}, "not a multiple of n_kv_heads=3"),
        ({"compat": "jax"}, "future keys would change past outputs"),
        ({"compat": "jax", "causal": False, "feature_map": "relu"}, "no stabiliser"),
        ({"feature_eps": 1e-3}, "make weights depend on other tokens"),
        ({"key_eps": 1e-3}, "key_eps goes with feature_map='relu'"),
        ({"orthogonal": False, "projection_norms": "sqrt"}, "no effect with orthogonal=False"),
        ({"features": "relu"}, "features"),
    ):
        with pytest.raises(ValidationError, match=said):
            PerformerConfig(d_model=64, **given)
    with pytest.raises(UnsupportedCapability, match="stateful"):
        layer("bidirectional").extend(tokens(1, 3), None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("name", ["performer_layer_softmax", "performer_layer_generalized"])
def test_recorded_layers_come_back(name: str, backend: str, dtype: torch.dtype):
    case = load_case(name)
    config, weights = convert(case.sidecar["peer"]["object"], case.config, case.parameters())
    mixer = DEFINITION.make(config).to(dtype)
    mixer.load_state_dict(weights)
    mixer.backend = backend
    x = case.tensors["x"].to(dtype).requires_grad_()
    y = mixer(x)
    (y * case.tensors["w"].to(dtype)).sum().backward()
    inner = config.heads * config.width
    found = {"y": y, "grad_x": x.grad, "grad.to_out.weight": mixer.out_proj.weight.grad}
    found["grad.to_out.bias"] = mixer.out_proj.bias.grad
    for n, part in enumerate(("to_q", "to_k", "to_v")):
        found[f"grad.{part}.weight"] = mixer.in_proj.weight.grad[n * inner : (n + 1) * inner]
    assert {key for key in case.tensors if key.startswith("grad")} == set(found) - {"y"}
    for key, value in found.items():
        assert relative_rms(value, case.tensors[key]) < recorded_allowance(case, key, dtype), key


PEER = {"dim": 8, "heads": 2, "dim_head": 4, "nb_features": 6, "generalized_attention": True}


def peer_weights(**changes: Tensor) -> dict[str, Tensor]:
    weights = {f"to_{part}.weight": torch.randn(8, 8) for part in ("q", "k", "v", "out")}
    weights["to_out.bias"], weights["fast_attention.projection_matrix"] = torch.randn(8), torch.randn(6, 4)
    return weights | changes


def test_a_causal_generalized_layer_is_its_equation():
    weights = {name: weight.double() for name, weight in peer_weights().items()}
    config, ours = convert("SelfAttention", PEER | {"causal": True}, weights)
    mixer = DEFINITION.make(config).double()
    mixer.load_state_dict(ours)
    x = tokens(2, 9, 8)
    heads = [x @ weights[f"to_{part}.weight"].T for part in "qkv"]
    q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in heads)
    phi_q, phi_k = ((p * 4**-0.25 @ weights["fast_attention.projection_matrix"].T).relu() + 1e-3 for p in (q, k))
    total = torch.einsum("bhtm,bhtm->bht", phi_q, phi_k.cumsum(2) + 1e-6)
    mixed = (phi_q @ phi_k.mT).tril() @ v / total.unsqueeze(-1)
    wanted = mixed.transpose(1, 2).flatten(2) @ weights["to_out.weight"].T + weights["to_out.bias"]
    torch.testing.assert_close(mixer(x), wanted, **EXACT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"generalized_attention": False, "causal": True}, "future keys change past outputs"),
        ({"local_heads": 1}, "local_heads=1"),
        ({"no_projection": True}, "no_projection=True"),
        ({"dropout": 0.1}, r"dropout=0\.1"),
        ({"kernel_fn": "GELU"}, "kernel_fn='GELU'"),
        ({"ortho_scaling": 2}, "ortho_scaling=2"),
        ({"context": 1}, "'context' is not known"),
        ({"nb_features": -1}, "n_features"),
    ],
)
def test_options_that_we_lack_are_refused(changes: dict[str, Any], said: str):
    made, _ = convert("SelfAttention", PEER, peer_weights())
    assert (made.causal, made.feature_map, made.n_features, made.out_bias) == (False, "relu", 6, True)
    with pytest.raises(ReferenceMismatch, match=said):
        convert("SelfAttention", PEER | changes, peer_weights())
    with pytest.raises(ReferenceMismatch, match=r"not known: to_q.bias"):
        convert("SelfAttention", PEER, peer_weights(**{"to_q.bias": torch.zeros(8)}))
    with pytest.raises(ReferenceMismatch, match="SelfAttention"):
        convert("CrossAttention", PEER, peer_weights())

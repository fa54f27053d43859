"""The linear attention layer against its own equations, recorded layers, and what the contract asks of it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.linear_attention import FEATURE_MAPS
from zoo.ops.semiseparable.triton_path import WIDEST

from golden import load_case
from layers import (
    EXACT,
    FLOAT64,
    PADS,
    agree,
    attention_layer_parts,
    build,
    expect_recorded,
    extend_in_pieces,
    from_case,
    padded,
    tokens,
    with_gradients,
)
from sequence_mixer import UnsupportedCapability
from sequence_mixer.conformance.budget import relative_rms
from sequence_mixer.definition import LowRank, RowStochastic, Semiseparable
from sequence_mixer.errors import ReferenceMismatch
from zoo_linear_attention import EXAMPLES, KERNEL_WIDEST, zoo_register_mixers
from zoo_linear_attention.config import LinearAttentionConfig
from zoo_linear_attention.from_reference import convert
from zoo_linear_attention.mixer import LinearAttentionMixer, LinearAttentionState
from zoo_linear_attention.reference import linear_attention_layer

DEFINITION = zoo_register_mixers()[0]
CAUSAL = [key for key in EXAMPLES if EXAMPLES[key].get("causal", True)]


def layer(example: str = "default", backend: str = "auto") -> LinearAttentionMixer:
    mixer = build(DEFINITION, example)
    assert isinstance(mixer, LinearAttentionMixer)
    mixer.backend = backend
    return mixer


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("length", [1, 7, 67])
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_layer_equals_its_equations(example: str, length: int, backend: str):
    mixer, x = layer(example, backend), tokens(2, length).requires_grad_()
    cotangent = tokens(2, length)
    wanted = linear_attention_layer(mixer.config, dict(mixer.named_parameters()), x)
    agree(
        with_gradients(mixer, mixer(x), x, cotangent=cotangent),
        with_gradients(mixer, wanted, x, cotangent=cotangent),
    )


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("sizes", [[1] * 12, [2] * 6, [5, 1, 6], [12]], ids=str)
@pytest.mark.parametrize("example", CAUSAL)
def test_extending_in_pieces_equals_the_whole(example: str, sizes: list[int], backend: str):
    mixer, x = layer(example, backend), tokens(2, 12).requires_grad_()
    pieces, state = extend_in_pieces(mixer, x, sizes)
    cotangent = tokens(2, 12)
    agree(
        with_gradients(mixer, pieces, x, cotangent=cotangent), with_gradients(mixer, mixer(x), x, cotangent=cotangent)
    )
    whole = mixer.extend(x, mixer.initial_state(2))[1]
    torch.testing.assert_close(state.sums, whole.sums, **EXACT)


def test_old_states_stay_valid_and_carry_gradients():
    mixer, x = layer("many_heads"), tokens(2, 9)
    state = mixer.extend(x[:, :5], mixer.initial_state(2))[1].detach()
    leaf = LinearAttentionState(state.sums.requires_grad_())
    kept = state.sums.detach().clone()
    y, after = mixer.extend(x[:, 5:], leaf, donate=True)
    again = mixer.extend(x[:, 5:], leaf)[0]
    assert torch.equal(y, again)
    assert torch.equal(state.sums, kept)
    (gradient,) = torch.autograd.grad(y.square().sum() + after.sums.square().sum(), [leaf.sums])
    assert bool((gradient != 0).all())


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


@pytest.mark.parametrize("example", CAUSAL)
def test_packed_sequences_extend_their_own_rows(example: str):
    mixer, lengths = layer(example), [2, 0, 5]
    past, pieces = [tokens(1, 4) for _ in lengths], [tokens(1, length) for length in lengths]
    state = mixer.extend(torch.cat(past), mixer.initial_state(3))[1]
    y, after = mixer.extend(torch.cat(pieces, 1), state, cu_seqlens=torch.tensor([0, 2, 2, 7]))
    whole = [torch.cat(both, 1) for both in zip(past, pieces, strict=True)]
    torch.testing.assert_close(y, torch.cat([mixer(row)[:, 4:] for row in whole], 1), **EXACT)
    sums = torch.cat([mixer.extend(row, mixer.initial_state(1))[1].sums for row in whole])
    torch.testing.assert_close(after.sums, sums, **EXACT)


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


@pytest.mark.parametrize("example", CAUSAL)
def test_padded_pieces_extend_like_their_rows(example: str):
    mixer, counts = layer(example), [12 - left - right for left, right in PADS]
    rows = [tokens(1, count + 12)[0].requires_grad_() for count in counts]
    first, mask = padded([row[:count] for row, count in zip(rows, counts, strict=True)], PADS)
    y, state = mixer.extend(first, mixer.initial_state(4), padding_mask=mask)
    ends = [row[count : 2 * count] for row, count in zip(rows, counts, strict=True)]
    z, after = mixer.extend(padded(ends, PADS)[0], state, padding_mask=mask)
    assert bool((z[~mask] == 0).all())
    rows = [row[: 2 * count].detach().requires_grad_() for row, count in zip(rows, counts, strict=True)]
    whole = [mixer.extend(row[None], mixer.initial_state(1)) for row in rows]
    ours = [torch.cat([a[real], b[real]]) for a, b, real in zip(y, z, mask, strict=True)]
    agree(ours, [out[0] for out, _ in whole])
    torch.testing.assert_close(after.sums, torch.cat([state.sums for _, state in whole]), **EXACT)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_matrix_form_is_the_layer_and_has_the_declared_structure(example: str):
    mixer, x = layer(example), tokens(2, 40)
    form = mixer.matrix_form(x)
    torch.testing.assert_close(form.apply(), mixer(x), **EXACT)
    matrix = form.matrix
    torch.testing.assert_close(form.heads(slice(0, 1)), matrix[:, :1], **EXACT)
    rank = torch.linalg.matrix_rank
    for structure in mixer.capabilities.structures:
        if isinstance(structure, LowRank):
            assert int(rank(matrix, rtol=1e-10).max()) <= structure.rank
        elif isinstance(structure, Semiseparable):
            assert int(rank(matrix[..., 20:, :20], rtol=1e-10).max()) <= structure.rank
        elif isinstance(structure, RowStochastic):
            assert bool((matrix >= 0).all())
            torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]), rtol=0, atol=1e-5)
    if mixer.config.causal:
        assert form.factors is not None
        mask, left, right = form.factors.mask(slice(0, 1)), form.factors.left, form.factors.right
        built = mask * torch.einsum("bthn,bshn->bhts", left[:, :, :1], right[:, :, :1])
        torch.testing.assert_close(built, matrix[:, :1], **EXACT)
        assert bool((matrix.triu(1) == 0).all())
    else:
        assert form.factors is None
        assert bool((matrix.triu(1) != 0).any())


def test_only_positive_features_promise_rows_that_sum_to_one():
    promised = {key for key in EXAMPLES if RowStochastic() in layer(key).capabilities.structures}
    assert promised == {"default", "many_heads", "bidirectional"}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_cost_is_what_torch_counts(example: str):
    mixer = layer(example).float()
    cost = mixer.cost(2, 192, torch.float32)
    with FlopCounterMode(display=False) as counter:
        mixer(tokens(2, 192).float())
    assert abs(counter.get_total_flops() / cost.flops - 1) < 0.1
    assert cost.parameters == sum(parameter.numel() for parameter in mixer.parameters())
    assert cost.bytes == (cost.parameters + 2 * 2 * 192 * 64) * 4
    held = mixer.initial_state(2).sums.numel() if mixer.config.causal else 0
    assert cost.state_elements == held


@pytest.mark.parametrize("example", ["many_heads", "bidirectional"])
def test_calls_compile_whole(example: str):
    torch._dynamo.reset()
    mixer, x = layer(example), tokens(1, 12)
    calls: list[dict[str, Any]] = [
        {},
        {"cu_seqlens": torch.tensor([0, 5, 5, 12])},
        {"padding_mask": torch.arange(12) < torch.tensor([[7]])},
    ]
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    for options in calls:
        torch.testing.assert_close(compiled(x, **options), mixer(x, **options), **EXACT)
    if mixer.config.causal:
        extend = torch.compile(mixer.extend, backend="aot_eager", fullgraph=True)
        state = mixer.extend(x, mixer.initial_state(1))[1].detach()
        y, after = extend(x[:, :1], state)
        wanted, wanted_after = mixer.extend(x[:, :1], state)
        agree([y, after.sums], [wanted, wanted_after.sums])


def test_autocast_gives_its_dtype_and_keeps_the_state_wide():
    mixer, x = layer("many_heads").float(), tokens(2, 70).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
        pieces, state = extend_in_pieces(mixer, x, [40, 1, 29])
    assert y.dtype == pieces.dtype == torch.bfloat16
    assert state.sums.dtype == torch.float32
    assert relative_rms(y, mixer(x)) < 2e-2
    assert relative_rms(pieces, y) < 1e-2
    half = mixer.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.initial_state(1).sums.dtype == torch.float32


def test_the_config_and_the_operator_know_the_same_maps():
    field = LinearAttentionConfig.model_fields["feature_map"]
    assert set(get_args(field.annotation)) == set(FEATURE_MAPS)
    assert KERNEL_WIDEST == WIDEST
    shown = {(example.get("feature_map", field.default), example.get("causal", True)) for example in EXAMPLES.values()}
    assert {name for name, _ in shown} == set(FEATURE_MAPS)


def test_backends_are_those_that_serve_the_config():
    names = lambda **given: [
        spec.name for spec in DEFINITION.capabilities_of(LinearAttentionConfig(d_model=1024, **given)).backends
    ]
    assert names() == ["triton", "chunked", "reference"]
    assert names(causal=False) == ["chunked", "reference"]
    assert names(n_heads=2) == ["chunked", "reference"]


def test_bad_configs_and_calls_are_refused_in_words():
    for given, said in (
        ({"d_model": 64, "n_heads": 3}, "not a multiple of n_heads=3"),
        ({"d_model": 64, "feature_map": "elu"}, "elu_plus_one"),
        ({"d_model": 64, "eps": 0.0}, "greater than 0"),
        ({"d_model": 64, "eps": 1e-3, "normalize": False}, "no effect with normalize=False"),
        ({"d_model": 64, "feature": "relu"}, "feature"),
    ):
        with pytest.raises(ValidationError, match=said):
            LinearAttentionConfig(**given)
    with pytest.raises(UnsupportedCapability, match="stateful"):
        layer("bidirectional").extend(tokens(1, 3), None)


def width_of(config: dict[str, Any]) -> int:
    return int(config["layer"]["d_model"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("name", ["linear_attn_bidir", "linear_attn_bidir_padded", "linear_attn_causal"])
def test_recorded_layers_come_back(name: str, backend: str, dtype: torch.dtype):
    case = load_case(name)
    mixer = from_case("linear_attention", case, dtype)
    mixer.backend = backend
    expect_recorded(case, mixer, dtype, attention_layer_parts(width_of(case.config)))


@torch.no_grad()
def test_recorded_decode_steps_and_states_come_back():
    case = load_case("linear_attn_causal")
    mixer, x = from_case("linear_attention", case, torch.float64), case.tensors["x"]
    steps, stepped = extend_in_pieces(mixer, x, [1] * x.shape[1])
    _, filled = mixer.extend(x, mixer.initial_state(x.shape[0]))
    assert relative_rms(steps, case.tensors["y_step"]) < FLOAT64
    for state in (stepped, filled):
        assert relative_rms(state.sums[..., :-1], case.tensors["final_state_S"]) < FLOAT64
        assert relative_rms(state.sums[..., -1], case.tensors["final_state_Z"]) < FLOAT64


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("", {"causal": False}, "causal=False is not reproduced"),
        ("", {"mask": 1}, "'mask' is not known"),
        ("layer", {"d_values": 3}, "d_values=3"),
        ("layer", {"d_keys": 3, "d_values": 3}, "query_dimensions=4"),
        ("layer", {"attention": "LinearAttention"}, "attention='LinearAttention'"),
        ("inner", {"feature_map": "favor"}, "feature_map='favor'"),
        ("inner", {"eps": -1.0}, "eps"),
    ],
)
def test_options_that_we_lack_are_refused(part: str, changes: dict[str, Any], said: str):
    peer = "AttentionLayer(CausalLinearAttention)"
    weights: dict[str, Tensor] = {}
    for name in ("query", "key", "value", "out"):
        weights[f"{name}_projection.weight"], weights[f"{name}_projection.bias"] = torch.zeros(8, 8), torch.zeros(8)
    given: dict[str, Any] = {"layer": {"d_model": 8, "n_heads": 2}, "inner": {"query_dimensions": 4, "eps": 1e-5}}
    made, _ = convert(peer, given, weights)
    assert (made.causal, made.eps, made.feature_map) == (True, 1e-5, "elu_plus_one")
    changed = given | changes if not part else given | {part: given[part] | changes}
    with pytest.raises(ReferenceMismatch, match=said):
        convert(peer, changed, weights)
    with pytest.raises(ReferenceMismatch, match=r"missing: query_projection.bias"):
        convert(peer, given, {key: value for key, value in weights.items() if key != "query_projection.bias"})
    with pytest.raises(ReferenceMismatch, match="AttentionLayer"):
        convert("LinearAttention", given, weights)

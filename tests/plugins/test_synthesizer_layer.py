"""The synthesizer layer against its own equations, recorded cases, the structures of its parts, and the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo.ops
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.softmax_attention import MAX_HEAD_WIDTH as SOFTMAX_WIDEST
from zoo.ops.synthetic_attention import MAX_WIDTH

import zoo_synthesizer.logits as synthesizer_logits
import zoo_synthesizer.mixer as synthesizer_module
from golden import load_case
from layers import (
    EXACT,
    FLOAT64,
    PADS,
    agree,
    build,
    expect_recorded,
    extend_in_pieces,
    padded,
    recorded_allowance,
    tokens,
    with_gradients,
)
from sequence_mixer import UnsupportedCapability
from sequence_mixer.conformance.budget import relative_rms
from sequence_mixer.errors import LengthError, ReferenceMismatch
from zoo_synthesizer import EXAMPLES, KERNEL_WIDEST, zoo_register_mixers
from zoo_synthesizer.config import PARTS, SynthesizerConfig
from zoo_synthesizer.from_reference import PART_OF, PEER, WEIGHTS_OF, convert
from zoo_synthesizer.mixer import KeyValueState, SynthesizerMixer, ValueState
from zoo_synthesizer.reference import layer_logits, synthesizer_layer
from zoo_synthesizer.segments import padded_segments

DEFINITION = zoo_register_mixers()[0]
CAUSAL = [key for key in EXAMPLES if EXAMPLES[key].get("causal", True)]
RECORDED = [
    "synth_dense",
    "synth_dense_causal",
    "synth_random",
    "synth_random_causal",
    "synth_fac_random",
    "synth_fac_dense",
    "synth_mixture",
    "synth_mixture_dense_causal",
]


def layer(example: str = "default", backend: str = "auto") -> SynthesizerMixer:
    mixer = build(DEFINITION, example)
    assert isinstance(mixer, SynthesizerMixer)
    mixer.backend = backend
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.endswith((".b1", ".b2", "alpha_logits")):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return mixer


def made(**options: Any) -> SynthesizerMixer:
    mixer = DEFINITION.make(SynthesizerConfig(**({"d_model": 16, "n_heads": 2, "max_length": 12} | options))).double()
    assert isinstance(mixer, SynthesizerMixer)
    return mixer


@pytest.fixture
def as_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`backend="triton"` takes no mask, as on a GPU, and computes by the definition."""

    def attend(name: str) -> Any:
        def call(*operands: Tensor, backend: str, **options: Any) -> Tensor:
            assert backend != "triton" or options.get("bias") is None
            result: Tensor = getattr(zoo.ops, name)(*operands, backend="reference", **options)
            return result

        return call

    for name in ("softmax_attention", "synthetic_attention", "random_attention"):
        monkeypatch.setattr(synthesizer_module, name, attend(name))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_layer_equals_its_equations(example: str, length: int, backend: str):
    mixer, x = layer(example, backend), tokens(2, length).requires_grad_()
    for parameter in mixer.parameters():
        parameter.requires_grad_()  # those of a fixed part are compared too
    cotangent = tokens(2, length)
    wanted = synthesizer_layer(mixer.config, dict(mixer.named_parameters()), x)
    agree(
        with_gradients(mixer, mixer(x), x, cotangent=cotangent),
        with_gradients(mixer, wanted, x, cotangent=cotangent),
    )


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("sizes", [[1] * 12, [5, 1, 6], [12]], ids=str)
@pytest.mark.parametrize("example", CAUSAL)
def test_extending_in_pieces_equals_the_whole(example: str, sizes: list[int], grad: bool):
    mixer, x = layer(example), tokens(2, 12).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        whole = mixer(x)
        pieces, state = extend_in_pieces(mixer, x, sizes)
    torch.testing.assert_close(pieces, whole, **EXACT)
    assert state.positions.tolist() == [12, 12]
    assert isinstance(state, KeyValueState if "vanilla" in mixer.config.parts else ValueState)
    if grad:
        cotangent = tokens(2, 12)
        trained = [parameter for parameter in mixer.parameters() if parameter.requires_grad]
        for y in (pieces, whole):
            found = torch.autograd.grad((y * cotangent).sum(), [x, *trained], retain_graph=True)
            wanted = torch.autograd.grad((whole * cotangent).sum(), [x, *trained], retain_graph=True)
            agree(found, wanted)


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("example", CAUSAL)
@torch.no_grad()
def test_rows_of_different_lengths_stand_at_their_own_positions(example: str, backend: str, as_kernels: None):
    mixer, counts = layer(example, backend), [12 - left - right for left, right in PADS]
    rows = [tokens(1, count + 6)[0] for count in counts]
    x, mask = padded([row[:count] for row, count in zip(rows, counts, strict=True)], PADS)
    y, state = mixer.extend(x, mixer.initial_state(4), padding_mask=mask)
    outputs = [[part[real]] for part, real in zip(y, mask, strict=True)]
    more = [row[count:] for row, count in zip(rows, counts, strict=True)]
    for donate in (False, True):  # one token each
        at = 1 if donate else 0
        y, state = mixer.extend(torch.stack([row[at : at + 1] for row in more]), state, donate=donate)
        outputs = [[*parts, part] for parts, part in zip(outputs, y, strict=True)]
    lengths = [2, 0, 1, 1]  # and a packed piece
    cu = torch.tensor([0, 2, 2, 3, 4])
    packed = torch.cat([row[2 : 2 + n] for row, n in zip(more, lengths, strict=True)])
    y, state = mixer.extend(packed[None], state, cu_seqlens=cu)
    outputs = [[*parts, part] for parts, part in zip(outputs, y[0].split(lengths), strict=True)]
    used = [count + 2 + n for count, n in zip(counts, lengths, strict=True)]
    assert state.positions.tolist() == used
    for parts, row, n in zip(outputs, rows, used, strict=True):
        torch.testing.assert_close(torch.cat(parts), mixer(row[None, :n])[0], **EXACT)


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_packed_sequences_do_not_meet_and_positions_restart(example: str, backend: str):
    mixer, lengths = layer(example, backend), [3, 0, 7, 1, 0]
    pieces = [tokens(1, length).requires_grad_() for length in lengths]
    cu = torch.tensor([0, 3, 3, 10, 11, 11], dtype=torch.int32)
    cotangent = tokens(1, 11)
    separate = torch.cat([mixer(piece) for piece in pieces], 1)
    packed = mixer(torch.cat(pieces, 1), cu_seqlens=cu)
    trained = [*pieces, *(parameter for parameter in mixer.parameters() if parameter.requires_grad)]
    found = [torch.autograd.grad((y * cotangent).sum(), trained, allow_unused=True) for y in (packed, separate)]
    torch.testing.assert_close(packed, separate, **EXACT)
    agree([g for g in found[0] if g is not None and g.numel()], [g for g in found[1] if g is not None and g.numel()])


@pytest.mark.parametrize("example", EXAMPLES)
def test_padding_changes_nothing_and_comes_out_as_zero(example: str):
    mixer = layer(example)
    rows = [tokens(1, 12 - left - right)[0] for left, right in PADS]
    x, mask = padded(rows, PADS)
    y = mixer(x, padding_mask=mask)
    assert bool((y[~mask] == 0).all())
    torch.testing.assert_close(y[mask], torch.cat([mixer(row[None])[0] for row in rows]), **EXACT)


def test_a_padded_batch_is_three_pieces_a_row():
    mask = torch.tensor([[False, True, True], [True, False, False], [False, False, False]])
    segments = padded_segments(mask)
    assert segments.cu_seqlens.tolist() == [0, 1, 3, 3, 3, 4, 6, 6, 6, 9]
    assert segments.rows.tolist() == [-1, 0, -1, -1, 1, -1, -1, 2, -1]
    assert segments.positions(9).tolist() == [[0, 0, 1, 0, 0, 1, 0, 1, 2]]
    assert segments.positions(9, torch.tensor([10, 20, 30])).tolist() == [[0, 10, 11, 20, 0, 1, 0, 1, 2]]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_matrix_form_is_the_layer(example: str):
    mixer, x = layer(example), tokens(2, 17)
    form = mixer.matrix_form(x)
    torch.testing.assert_close(form.apply(), mixer(x), **EXACT)
    assert form.matrix.shape == (2, mixer.heads, 17, 17)
    torch.testing.assert_close(form.heads(slice(1, 2)), form.matrix[:, 1:2], **EXACT)
    torch.testing.assert_close(form.matrix.sum(-1), torch.ones_like(form.matrix[..., 0]), **EXACT)
    assert bool((form.matrix.triu(1) == 0).all()) == mixer.config.causal
    logits = torch.stack([layer_logits(mixer.config, mixer.state_dict(), x[1], h) for h in range(mixer.heads)])
    torch.testing.assert_close(mixer.logit_matrix(x)[1], logits, **EXACT)


def test_the_matrix_of_random_parts_knows_no_input():
    for parts in (("random",), ("factorised_random",), ("random", "factorised_random")):
        mixer = made(parts=parts)
        one, two = (mixer.matrix_form(tokens(2, 10, 16)).matrix for _ in range(2))
        assert torch.equal(one, two)
        assert torch.equal(one[0], one[1])
        assert not mixer.capabilities.data_dependent


@pytest.mark.parametrize("parts", [("dense",), ("factorised_dense",), ("dense", "random")])
def test_a_row_of_a_dense_matrix_depends_on_its_own_token_alone(parts: tuple[str, ...]):
    mixer = made(parts=parts, causal=False)
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer.matrix_form(x).matrix[0], tokens(1, 6, 16))
    by_token = jacobian[:, :, :, 0].abs().amax((0, 2, 4))  # [row, token]
    assert bool((by_token.diagonal() > 0).all())
    assert float((by_token - by_token.diag().diag()).abs().max()) == 0.0
    assert mixer.capabilities.data_dependent


def test_factorised_logits_have_the_rank_of_their_factors():
    x = tokens(1, 12, 16)
    random = made(parts=("factorised_random",), rank=3).logit_matrix(x)
    for head in random[0]:
        assert int(torch.linalg.matrix_rank(head)) == 3
    mixer = made(parts=("factorised_dense",), factors=(3, 4))
    for row in mixer.logit_matrix(x).unflatten(-1, (3, 4)).flatten(0, 2):
        assert int(torch.linalg.matrix_rank(row)) <= 1
    assert int(torch.linalg.matrix_rank(mixer.matrix_form(x).matrix[0, 0])) > 3  # the softmax has full rank


def test_a_random_layer_is_a_linear_layer_over_the_tokens_with_softmaxed_weights():
    """One layer of an MLP-Mixer: the same weights over the token axis for every channel."""
    mixer, x = made(parts=("random",), n_heads=1, causal=False), tokens(3, 12, 16)
    table = mixer.state_dict()["logits.random.table"][0]
    over_tokens = torch.nn.Linear(12, 12, bias=False, dtype=torch.float64)
    with torch.no_grad():
        over_tokens.weight.copy_(table.softmax(-1))
    torch.testing.assert_close(mixer(x), mixer.out_proj(over_tokens(mixer.v_proj(x).mT).mT), **EXACT)


def test_tied_dense_logits_come_from_the_queries_of_vanilla():
    mixer, x = made(parts=("dense", "vanilla"), tied_w2=True), tokens(1, 7, 16)
    weights = mixer.state_dict()
    assert weights["logits.dense.w2"].shape == (1, 12, 8)
    assert "logits.dense.w1" not in weights
    q = (x @ weights["logits.vanilla.q_proj.weight"].T)[0].unflatten(-1, (2, 8))
    k = (x @ weights["logits.vanilla.k_proj.weight"].T)[0].unflatten(-1, (2, 8))
    dense = torch.einsum("thp,jp->htj", q.relu(), weights["logits.dense.w2"][0, :7])
    vanilla = torch.einsum("thp,jhp->htj", q, k) / 8**0.5
    torch.testing.assert_close(mixer.logit_matrix(x)[0], (dense + vanilla) / 2, **EXACT)


def test_fixed_parts_are_stored_and_not_trained():
    mixer = made(parts=("random", "vanilla"), fixed=True)
    assert "logits.random.table" in mixer.state_dict()
    mixer(tokens(1, 5, 16)).sum().backward()
    assert [n for n, p in mixer.named_parameters() if p.grad is None] == ["logits.random.table"]
    assert all(p.requires_grad for p in made(parts=("random", "vanilla")).parameters())


def test_what_a_part_has_learned_is_handed_over_without_a_copy():
    x = tokens(2, 9, 16)
    for part, name, operand in (("random", "table", "table"), ("dense", "w2", "k"), ("factorised_random", "r1", "q")):
        mixer = made(parts=(part,))
        given = mixer.logits.operands(x, slice(0, 9), slice(0, 9), None, 9)
        learned = mixer.get_parameter(f"logits.{part}.{name}")
        assert getattr(given, operand).untyped_storage().data_ptr() == learned.untyped_storage().data_ptr()


def test_learned_logits_start_within_the_bounds_of_glorot():
    mixer = made(parts=("random", "dense"), d_hidden=4)
    bounds = {"random.table": (6 / 24) ** 0.5, "dense.w1": (6 / 20) ** 0.5, "dense.w2": (6 / 16) ** 0.5}
    for name, bound in bounds.items():
        largest = float(mixer.state_dict()[f"logits.{name}"].abs().max())
        assert 0.8 * bound < largest <= bound
    torch.testing.assert_close(mixer.state_dict()["logits.alpha_logits"].softmax(0), torch.full((2,), 0.5).double())


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_cost_is_what_torch_counts(example: str, backend: str):
    mixer = layer(example, backend).float()
    length = min(96, mixer.config.max_length)
    cost = mixer.cost(2, length, torch.float32)
    with FlopCounterMode(display=False) as counter:
        mixer(tokens(2, length).float())
    assert abs(counter.get_total_flops() / cost.flops - 1) < 0.01
    assert cost.parameters == sum(parameter.numel() for parameter in mixer.parameters())
    elements = 0
    if mixer.config.causal:
        state = mixer.extend(tokens(2, length).float(), mixer.initial_state(2))[1]
        elements = sum(leaf.numel() for leaf in state.leaves().values())
    assert cost.state_elements == elements


def test_what_cancels_in_the_gradient_of_a_mixture_weight_leaves_no_rounding():
    raised, cotangent = torch.randn(1, 3000, 4, 16), torch.randn(1, 3000, 4, 16)
    raised, cotangent = torch.cat([raised, raised]), torch.cat([cotangent, -cotangent])
    raised[1, -1] += 1e-3
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(synthesizer_logits._times(raised, alpha), alpha, cotangent)
    wanted = float((raised.double() * cotangent).sum())
    assert float(found) == pytest.approx(wanted, rel=1e-3)


def test_each_config_runs_on_the_operator_made_for_it():
    for example, wanted in (
        ("default", "softmax_attention"),
        ("factorised_random", "softmax_attention"),
        ("mixture_tied", "softmax_attention"),
        ("random", "random_attention"),
        ("factorised_dense", "synthetic_attention"),
        ("mixture", "synthetic_attention"),
    ):
        with zoo.ops.record_dispatch() as record:
            layer(example)(tokens(1, 9))
        assert [choice.op for choice in record] == [wanted], example


def test_a_sequence_longer_than_max_length_is_refused():
    mixer, x = made(parts=("random",)), tokens(2, 13, 16)
    with pytest.raises(LengthError, match="13 tokens, max_length is 12"):
        mixer(x)
    state = mixer.extend(x[:, :12], mixer.initial_state(2, capacity=64))[1]
    with pytest.raises(LengthError, match="would have 13 tokens, max_length is 12"):
        mixer.extend(x[:, 12:], state)
    ragged = mixer.extend(x[:, :4], mixer.initial_state(2), padding_mask=torch.tensor([[True] * 4, [False] * 4]))[1]
    assert ragged.positions.tolist() == [4, 0]
    with pytest.raises(LengthError, match="would have 13 tokens"):
        mixer.extend(x[:, :9], ragged)
    y, _ = mixer.extend(x[:, :9], ragged, padding_mask=torch.tensor([[True] * 8 + [False], [True] * 9]))
    assert bool(y.isfinite().all())


def test_where_lengths_cannot_be_looked_at_what_is_too_long_becomes_nan():
    torch._dynamo.reset()
    mixer, x = made(), tokens(1, 14, 16)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    y = compiled(x, cu_seqlens=torch.tensor([0, 1, 14]))  # 13 tokens in a row of at most 12
    assert bool(y[:, -1].isnan().all())
    torch.testing.assert_close(y[:, 1:13], mixer(x[:, 1:13]), **EXACT)


@pytest.mark.parametrize("example", ["random", "mixture_of_all"])
def test_forward_compiles_whole(example: str):
    torch._dynamo.reset()
    mixer, x = layer(example), tokens(1, 12)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    for options in ({}, {"cu_seqlens": torch.tensor([0, 5, 5, 12])}):
        torch.testing.assert_close(compiled(x, **options), mixer(x, **options), **EXACT)


@pytest.mark.parametrize("example", ["random", "mixture"])
@torch.no_grad()
def test_a_donated_step_compiles_at_static_shapes(example: str):
    torch._dynamo.reset()
    mixer, x = layer(example), tokens(2, 8)
    compiled = torch.compile(mixer.extend, backend="aot_eager", fullgraph=True)
    state = mixer.extend(x[:, :4], mixer.initial_state(2, capacity=200))[1]  # more room than max_length
    where, steps = state.values.untyped_storage().data_ptr(), []
    for t in range(4, 8):
        y, state = compiled(x[:, t : t + 1], state, donate=True)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), mixer(x)[:, 4:], **EXACT)
    assert state.values.untyped_storage().data_ptr() == where


def test_autocast_gives_its_dtype_and_serves_states_of_either():
    mixer, x = layer("mixture").float(), tokens(2, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
        assert y.dtype == torch.bfloat16
        for dtype in (torch.float32, torch.bfloat16):
            pieces, state = extend_in_pieces(mixer, x, [4, 1, 1], mixer.initial_state(2, dtype=dtype))
            assert state.values.dtype == dtype
            assert pieces.dtype == torch.bfloat16
            assert relative_rms(pieces, y) < 1e-2
    assert relative_rms(y, mixer(x)) < 2e-2


def test_options_that_no_part_has_are_refused():
    for given, said in (
        ({"parts": ()}, "at least 1 item"),
        ({"parts": ("vanilla",)}, "is the mixer 'attention'"),
        ({"parts": ("dense", "dense")}, "names a part twice"),
        ({"parts": ("sparse",)}, "factorised_dense"),
        ({"parts": ("random",), "d_hidden": 4}, "d_hidden=4 says something of dense and factorised_dense"),
        ({"parts": ("random",), "tied_w2": True}, "tied_w2=True says something of dense"),
        ({"parts": ("random",), "rank": 4}, "rank=4 says something of factorised_random"),
        ({"factors": (4, 300)}, "says something of factorised_dense"),
        ({"fixed": True}, "fixed=True says something of random"),
        ({"tied_w2": True, "d_hidden": 24}, "d_hidden=24, head_dim=64"),
        ({"parts": ("factorised_dense",), "factors": (4, 5)}, "cover 20 keys of 1024"),
        ({"max_length": 0}, "greater than 0"),
    ):
        with pytest.raises(ValidationError, match=said):
            SynthesizerConfig(d_model=64, **given)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 30, 997, 1024])
def test_a_grid_that_is_not_given_covers_every_key(length: int):
    rows, columns = SynthesizerConfig(d_model=64, parts=("factorised_dense",), max_length=length).grid
    assert length <= rows * columns < length + rows
    assert abs(rows - columns) <= 1


def test_what_a_config_cannot_do_is_refused():
    with pytest.raises(UnsupportedCapability, match="stateful"):
        layer("dense_wide").initial_state(1)
    assert KERNEL_WIDEST == SOFTMAX_WIDEST == MAX_WIDTH

    def names(**options: Any) -> list[str]:
        return [s.name for s in DEFINITION.capabilities_of(SynthesizerConfig(d_model=512, **options)).backends]

    assert names() == ["sdpa", "triton", "chunked", "reference"]
    assert names(d_hidden=257) == ["sdpa", "chunked", "reference"]
    assert names(parts=("random",)) == ["triton", "chunked", "reference"]
    assert names(parts=("dense", "vanilla"), n_heads=2, d_hidden=8) == ["sdpa", "chunked", "reference"]
    assert names(parts=("factorised_dense",), factors=(4, 300)) == ["chunked", "reference"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_layers_come_back(name: str, backend: str, dtype: torch.dtype):
    case = load_case(name)
    config, weights = convert(case.sidecar["peer"]["object"], case.config, case.parameters())
    mixer = DEFINITION.make(config).to(dtype)
    mixer.load_state_dict(weights)
    assert isinstance(mixer, SynthesizerMixer)
    mixer.backend = backend
    variants = case.config.get("parts", [case.config["variant"]])
    ours = {"Wv": "v_proj.weight", "Wo": "out_proj.weight"}
    for variant in variants:
        ours |= {theirs: f"logits.{mine}" for theirs, mine in WEIGHTS_OF[variant].items()}
    if len(variants) > 1:
        ours["alpha_logits"] = "logits.alpha_logits"
    expect_recorded(case, mixer, dtype, {theirs: (mine, slice(None)) for theirs, mine in ours.items()})
    if "logits" in case.tensors:
        found = mixer.logit_matrix(case.tensors["x"].to(dtype))
        assert relative_rms(found, case.tensors["logits"]) < recorded_allowance(case, "logits", dtype)


@torch.no_grad()
def test_decoding_a_recorded_layer_gives_its_outputs():
    for name in ("synth_random_causal", "synth_dense_causal", "synth_mixture_dense_causal"):
        case = load_case(name)
        config, weights = convert(PEER, case.config, case.parameters())
        mixer = DEFINITION.make(config).double()
        mixer.load_state_dict(weights)
        steps, _ = extend_in_pieces(mixer, case.tensors["x"], [1] * 20)
        assert relative_rms(steps, case.tensors["y"]) < FLOAT64


def test_every_part_can_be_read_from_the_equations():
    assert set(PART_OF.values()) == set(PARTS)
    assert set(WEIGHTS_OF) == set(PART_OF)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variant": "fixed"}, "no variant of .* named 'fixed'"),
        ({"variant": "vanilla"}, "no variant of .* named 'vanilla'"),
        ({"variant": "mixture", "parts": ["dense"]}, "name two parts or more"),
        ({"variant": "mixture", "parts": ["dense", "light"]}, "named 'light'"),
        ({"variant": "mixture"}, "argument 'parts' is missing"),
        ({"kf": 3}, "'kf' is not known"),
        ({"H": 3}, "not a multiple of n_heads=3"),
        ({"heads": 3}, "'heads' is not known"),
        ({"variant": "random"}, "'F' is not known"),
    ],
)
def test_options_of_the_equations_that_we_lack_are_refused(changes: dict[str, Any], said: str):
    weights = {"Wv": torch.zeros(8, 8), "Wo": torch.zeros(8, 8), "W1": torch.zeros(2, 3, 8), "W2": torch.zeros(2, 5, 3)}
    given = {"variant": "dense", "causal": True, "F": 3, "D": 8, "H": 2, "Lmax": 5}
    made_config, _ = convert(PEER, given, weights)
    assert made_config.d_hidden == 3
    with pytest.raises(ReferenceMismatch, match=said):
        convert(PEER, given | changes, weights)
    with pytest.raises(ReferenceMismatch, match="not known: W3"):
        convert(PEER, given, weights | {"W3": torch.zeros(1)})
    with pytest.raises(ReferenceMismatch, match="no reference module of synthesizer named 'Synthesiser'"):
        convert("Synthesiser", given, weights)

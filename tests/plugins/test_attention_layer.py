"""The attention layer against its own equations, recorded layers of other libraries, and what the contract asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.softmax_attention import MAX_HEAD_WIDTH

import zoo_attention.mixer as attention_module
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
from sequence_mixer.errors import ReferenceMismatch
from zoo_attention import EXAMPLES, KERNEL_WIDEST, zoo_register_mixers
from zoo_attention.config import AttentionConfig
from zoo_attention.from_reference import convert
from zoo_attention.mixer import AttentionMixer, AttentionState, token_positions
from zoo_attention.reference import attention_layer
from zoo_attention.rope import rotate

DEFINITION = zoo_register_mixers()[0]
CAUSAL = [key for key in EXAMPLES if EXAMPLES[key].get("causal", True)]
BACKENDS = ["sdpa", "chunked", "reference"]


def layer(example: str = "default", backend: str = "auto") -> AttentionMixer:
    mixer = build(DEFINITION, example)
    assert isinstance(mixer, AttentionMixer)
    mixer.backend = backend
    return mixer


@pytest.fixture
def as_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`backend="triton"` takes no mask, as on a GPU, and computes by the definition."""

    def attend(*operands: Tensor, backend: str, bias: Tensor | None = None, **options: Any) -> Tensor:
        assert backend != "triton" or bias is None
        return zoo.ops.softmax_attention(*operands, bias=bias, backend="reference", **options)

    monkeypatch.setattr(attention_module, "softmax_attention", attend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_layer_equals_its_equations(example: str, length: int, backend: str):
    mixer, x = layer(example, backend), tokens(2, length).requires_grad_()
    cotangent = tokens(2, length)
    wanted = attention_layer(mixer.config, dict(mixer.named_parameters()), x)
    agree(
        with_gradients(mixer, mixer(x), x, cotangent=cotangent),
        with_gradients(mixer, wanted, x, cotangent=cotangent),
    )


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("sizes", [[1] * 12, [2] * 6, [5, 1, 6], [12]], ids=str)
@pytest.mark.parametrize("example", CAUSAL)
def test_extending_in_pieces_equals_the_whole(example: str, sizes: list[int], grad: bool):
    mixer, x = layer(example), tokens(2, 12).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        whole = mixer(x)
        pieces, state = extend_in_pieces(mixer, x, sizes)
    torch.testing.assert_close(pieces, whole, **EXACT)
    assert state.positions.tolist() == [12, 12]
    if grad:
        cotangent = tokens(2, 12)
        agree(
            with_gradients(mixer, pieces, x, cotangent=cotangent), with_gradients(mixer, whole, x, cotangent=cotangent)
        )


def test_gradients_flow_through_the_state():
    mixer, x = layer("grouped"), tokens(2, 9)
    state = mixer.extend(x[:, :5], mixer.initial_state(2))[1].detach()
    leaves = AttentionState(state.keys.requires_grad_(), state.values.requires_grad_(), state.positions)
    y, after = mixer.extend(x[:, 5:], leaves)
    loss = y.square().sum() + after.values.sum()
    for gradient in torch.autograd.grad(loss, [leaves.keys, leaves.values]):
        assert bool((gradient[:, :5] != 0).all())


@pytest.mark.parametrize("donate", [False, True])
@torch.no_grad()
def test_old_states_stay_valid_and_forks_do_not_meet(donate: bool):
    mixer, x = layer("grouped"), tokens(2, 10)
    prompt, left, right = x[:, :4], x[:, 4:7], x[:, 7:]
    root = mixer.extend(prompt, mixer.initial_state(2, capacity=32))[1]
    kept = root.map(torch.clone)
    first, after_left = extend_in_pieces(mixer, left, [1, 1, 1], root)
    second, _ = extend_in_pieces(mixer, right, [2, 1], root)
    torch.testing.assert_close(first, mixer(torch.cat([prompt, left], 1))[:, 4:], **EXACT)
    torch.testing.assert_close(second, mixer(torch.cat([prompt, right], 1))[:, 4:], **EXACT)
    assert torch.equal(root.keys[:, :4], kept.keys[:, :4])
    third, last = extend_in_pieces(mixer, right, [1, 2], after_left, donate=donate)
    torch.testing.assert_close(third, mixer(torch.cat([prompt, left, right], 1))[:, 7:], **EXACT)
    assert (last.positions is after_left.positions) == donate


@torch.no_grad()
def test_decoding_rows_of_one_length_builds_no_mask(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a mask was built")

    monkeypatch.setattr(attention_module, "valid_mask", refuse)
    mixer, x = layer(), tokens(3, 8)
    for donate in (False, True):
        y, _ = extend_in_pieces(mixer, x, [4, 1, 1, 1, 1], donate=donate)
        torch.testing.assert_close(y, mixer(x), **EXACT)


@pytest.mark.parametrize("example", EXAMPLES)
def test_packed_sequences_do_not_meet(example: str):
    mixer, lengths = layer(example), [3, 0, 7, 1, 0]
    pieces = [tokens(1, length).requires_grad_() for length in lengths]
    cu = torch.tensor([0, 3, 3, 10, 11, 11], dtype=torch.int32)
    cotangent = tokens(1, 11)
    x = torch.cat(pieces, 1)
    separate = torch.cat([mixer(piece) for piece in pieces], 1)
    agree(
        with_gradients(mixer, mixer(x, cu_seqlens=cu), *pieces, cotangent=cotangent),
        with_gradients(mixer, separate, *pieces, cotangent=cotangent),
    )


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("example", CAUSAL)
def test_packed_sequences_extend_their_own_rows(example: str, grad: bool, backend: str, as_kernels: None):
    mixer = layer(example, backend)
    first, second, third = [4, 0, 2], [1, 3, 0], [0, 2, 2]
    rows = [tokens(1, sum(counts)).requires_grad_(grad) for counts in zip(first, second, third, strict=True)]
    with torch.set_grad_enabled(grad):
        state = mixer.initial_state(3, capacity=16)
        outputs: list[list[Tensor]] = [[], [], []]
        at = [0, 0, 0]
        for counts in (first, second, third):
            news = [row[:, start : start + count] for row, start, count in zip(rows, at, counts, strict=True)]
            cu = torch.tensor([0, *counts]).cumsum(0)
            y, state = mixer.extend(torch.cat(news, 1), state, cu_seqlens=cu)
            for s, part in enumerate(y.split(counts, 1)):
                outputs[s].append(part)
            at = [start + count for start, count in zip(at, counts, strict=True)]
        ours = torch.cat([torch.cat(parts, 1) for parts in outputs], 1)
        wanted = torch.cat([mixer(row) for row in rows], 1)
    assert state.positions.tolist() == at
    torch.testing.assert_close(ours, wanted, **EXACT)
    if grad:
        cotangent = tokens(1, wanted.shape[1])
        agree(
            with_gradients(mixer, ours, *rows, cotangent=cotangent),
            with_gradients(mixer, wanted, *rows, cotangent=cotangent),
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


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("example", CAUSAL)
def test_padded_prompts_decode_like_their_rows(example: str, grad: bool, donate: bool, backend: str, as_kernels: None):
    mixer = layer(example, backend)
    counts = [12 - left - right for left, right in PADS]
    rows = [tokens(1, count + 6)[0].requires_grad_(grad) for count in counts]
    with torch.set_grad_enabled(grad):
        x, mask = padded([row[:count] for row, count in zip(rows, counts, strict=True)], PADS)
        y, state = mixer.extend(x, mixer.initial_state(4, capacity=32), padding_mask=mask, donate=donate)
        outputs = [[part[real]] for part, real in zip(y, mask, strict=True)]
        more = [row[count:] for row, count in zip(rows, counts, strict=True)]
        for start in (0, 1):  # one token each, in rows of different lengths
            y, state = mixer.extend(torch.stack([row[start : start + 1] for row in more]), state, donate=donate)
            outputs = [[*parts, part] for parts, part in zip(outputs, y, strict=True)]
        pads = [(1, 0), (0, 1), (4, 0), (0, 4)]  # and a second padded piece
        x, mask = padded([row[2 : 7 - sum(pad)] for row, pad in zip(more, pads, strict=True)], pads)
        x = x[:, :5]
        y, state = mixer.extend(x, state, padding_mask=mask, donate=donate)
        assert bool((y[~mask] == 0).all())
        outputs = [[*parts, part[real]] for parts, part, real in zip(outputs, y, mask, strict=True)]
        ours = torch.cat([torch.cat(parts) for parts in outputs])
        used = [count + 7 - sum(pad) for count, pad in zip(counts, pads, strict=True)]
        used = [min(n, row.shape[0]) for n, row in zip(used, rows, strict=True)]
        wanted = torch.cat([mixer(row[None, :n])[0] for row, n in zip(rows, used, strict=True)])
    assert state.positions.tolist() == used
    torch.testing.assert_close(ours, wanted, **EXACT)
    if grad and not donate:
        cotangent = tokens(1, ours.shape[0])[0]
        agree(
            with_gradients(mixer, ours, *rows, cotangent=cotangent),
            with_gradients(mixer, wanted, *rows, cotangent=cotangent),
        )


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_matrix_form_is_the_layer(example: str):
    mixer, x = layer(example), tokens(2, 17)
    form = mixer.matrix_form(x)
    torch.testing.assert_close(form.apply(), mixer(x), **EXACT)
    assert form.matrix.shape == (2, mixer.heads, 17, 17)
    torch.testing.assert_close(form.heads(slice(1, 2)), form.matrix[:, 1:2], **EXACT)
    assert bool((form.matrix >= 0).all())
    torch.testing.assert_close(form.matrix.sum(-1), torch.ones_like(form.matrix[..., 0]), **EXACT)
    assert bool((form.matrix.triu(1) == 0).all()) == mixer.config.causal


@pytest.mark.parametrize("backend", ["sdpa", "chunked", "reference"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_cost_is_what_torch_counts(example: str, backend: str):
    mixer = layer(example, backend).float()
    cost = mixer.cost(2, 96, torch.float32)
    with FlopCounterMode(display=False) as counter:
        mixer(tokens(2, 96).float())
    assert abs(counter.get_total_flops() / cost.flops - 1) < 0.1
    assert cost.parameters == sum(parameter.numel() for parameter in mixer.parameters())
    assert cost.bytes == (cost.parameters + 2 * 2 * 96 * 64) * 4
    elements = 0
    if mixer.config.causal:
        state = mixer.extend(tokens(2, 96).float(), mixer.initial_state(2))[1]
        elements = sum(leaf.numel() for leaf in state.leaves().values())  # positions too
    assert cost.state_elements == elements


@pytest.mark.parametrize("example", ["grouped", "bidirectional"])
def test_forward_compiles_whole(example: str):
    torch._dynamo.reset()
    mixer, x = layer(example), tokens(1, 12)
    cu = torch.tensor([0, 5, 5, 12])
    mask = torch.arange(12) < torch.tensor([[7]])
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    for options in ({}, {"cu_seqlens": cu}, {"padding_mask": mask}):
        torch.testing.assert_close(compiled(x, **options), mixer(x, **options), **EXACT)


def test_extend_compiles_whole_with_gradients():
    torch._dynamo.reset()
    mixer, x = layer("grouped"), tokens(2, 6).requires_grad_()
    compiled = torch.compile(mixer.extend, backend="aot_eager", fullgraph=True)
    mask = torch.tensor([[False, True, True], [True, True, False]])
    cu = torch.tensor([0, 2, 3])
    for rows, options in ((2, {}), (2, {"padding_mask": mask}), (1, {"cu_seqlens": cu})):
        cotangent, found = tokens(rows, 3), []
        for extend in (compiled, mixer.extend):
            start = mixer.extend(x[:, :3], mixer.initial_state(2))[1]
            y, state = extend(x[:rows, 3:], start, **options)
            found.append([*with_gradients(mixer, y, x, cotangent=cotangent), state.positions])
        agree(*found)


@torch.no_grad()
def test_a_donated_step_compiles_at_static_shapes():
    torch._dynamo.reset()
    mixer, x = layer("grouped"), tokens(2, 9)
    compiled = torch.compile(mixer.extend, backend="aot_eager", fullgraph=True)
    state = mixer.extend(x[:, :4], mixer.initial_state(2, capacity=16))[1]
    where, steps = state.keys.untyped_storage().data_ptr(), []
    for t in range(4, 9):
        y, state = compiled(x[:, t : t + 1], state, donate=True)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), mixer(x)[:, 4:], **EXACT)
    assert state.keys.untyped_storage().data_ptr() == where
    assert state.positions.tolist() == [9, 9]


def test_autocast_gives_its_dtype_and_serves_states_of_either():
    mixer, x = layer("grouped").float(), tokens(2, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
        assert y.dtype == torch.bfloat16
        for dtype in (torch.float32, torch.bfloat16):
            state = mixer.initial_state(2, dtype=dtype)
            pieces = []
            for piece in x.split([4, 1, 1], 1):
                out, state = mixer.extend(piece, state)
                pieces.append(out)
            assert state.keys.dtype == dtype
            assert torch.cat(pieces, 1).dtype == torch.bfloat16
            assert relative_rms(torch.cat(pieces, 1), y) < 1e-2
    assert relative_rms(y, mixer(x)) < 2e-2


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_turned_products_depend_on_the_distance_alone(pairing: str):
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    turn = lambda x, at: rotate(x, torch.tensor([at]), pairing=pairing, base=100.0)
    near = (turn(q, 7) * turn(k, 3)).sum()
    far = (turn(q, 131_071) * turn(k, 131_067)).sum()
    torch.testing.assert_close(near, far, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(near, (turn(q, 7) * turn(k, 4)).sum())
    torch.testing.assert_close(turn(q, 0), q)


def test_positions_count_the_real_tokens_of_each_sequence():
    x, past = tokens(1, 6), torch.tensor([10, 20, 30])
    assert token_positions(x, None, torch.tensor([0, 2, 2, 6]), None).tolist() == [0, 1, 0, 1, 2, 3]
    assert token_positions(x, past, torch.tensor([0, 2, 2, 6]), None).tolist() == [10, 11, 30, 31, 32, 33]
    mask = torch.tensor([[False, False, True, True, True, False]])
    assert token_positions(x, None, None, mask)[0, 2:5].tolist() == [0, 1, 2]
    assert token_positions(x, past[:1], None, mask)[0, 2:5].tolist() == [10, 11, 12]


def test_sizes_that_are_not_given_follow_from_the_others():
    sizes = lambda **given: (lambda c: (c.heads, c.kv_heads, c.width))(AttentionConfig(**given))
    assert sizes(d_model=32) == (1, 1, 32)
    assert sizes(d_model=512) == (8, 8, 64)
    assert sizes(d_model=512, head_dim=32) == (16, 16, 32)
    assert sizes(d_model=512, n_heads=4, n_kv_heads=2) == (4, 2, 128)
    assert AttentionConfig(d_model=64).model_copy(update={"d_model": 256}).heads == 4
    for given, said in (
        ({"d_model": 64, "n_heads": 3}, "not a multiple of n_heads=3"),
        ({"d_model": 64, "n_heads": 4, "n_kv_heads": 3}, "not a multiple of n_kv_heads=3"),
        ({"d_model": 21, "n_heads": 3}, "head_dim=7 is odd"),
        ({"d_model": 64, "rope": "quarter"}, "interleaved"),
        ({"d_model": 64, "rope": "none", "rope_base": 500.0}, "no effect with rope='none'"),
        ({"d_model": 64, "scale": 0.0}, "greater than 0"),
        ({"d_model": 64, "heads": 2}, "heads"),
    ):
        with pytest.raises(ValidationError, match=said):
            AttentionConfig(**given)


def test_what_a_config_cannot_do_is_refused():
    mixer = layer("bidirectional")
    with pytest.raises(UnsupportedCapability, match="stateful"):
        mixer.initial_state(1)
    assert KERNEL_WIDEST == MAX_HEAD_WIDTH
    wide = DEFINITION.capabilities_of(AttentionConfig(d_model=1024, n_heads=2))
    assert "triton" not in [spec.name for spec in wide.backends]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("name", ["softmax_mha_bidir", "softmax_mha_causal", "softmax_ft_causal_steps"])
def test_recorded_layers_come_back(name: str, backend: str, dtype: torch.dtype):
    case = load_case(name)
    mixer = from_case("attention", case, dtype)
    mixer.backend = backend
    if name == "softmax_ft_causal_steps":
        parts = attention_layer_parts(case.config["layer"]["d_model"])
    else:
        parts = {theirs: (theirs.replace("proj_", "proj."), slice(None)) for theirs in case.parameters()}
    expect_recorded(case, mixer, dtype, parts)


@torch.no_grad()
def test_recorded_decode_steps_come_back():
    case = load_case("softmax_ft_causal_steps")
    mixer, x = from_case("attention", case, torch.float64), case.tensors["x"]
    for donate in (False, True):
        steps, _ = extend_in_pieces(mixer, x, [1] * x.shape[1], donate=donate)
        assert relative_rms(steps, case.tensors["y_step"]) < FLOAT64


def test_multihead_attention_itself_is_reproduced():
    theirs = torch.nn.MultiheadAttention(48, 4, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_bias.normal_()
    ours = zoo.from_reference(
        "attention", "torch.nn.MultiheadAttention", {"embed_dim": 48, "num_heads": 4}, theirs.state_dict()
    )
    x = tokens(2, 11, 48)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0], **EXACT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dropout": 0.1}, r"dropout=0.1 is not reproduced"),
        ({"add_bias_kv": True}, "add_bias_kv=True"),
        ({"add_zero_attn": True}, "add_zero_attn=True"),
        ({"kdim": 8}, "kdim=8"),
        ({"vdim": 8}, "vdim=8"),
        ({"num_head": 2}, "did you mean num_heads"),
        ({"num_heads": 5}, "not a multiple of n_heads=5"),
        ({"bias": True}, "missing: in_proj_bias"),
    ],
)
def test_options_of_multihead_attention_that_we_lack_are_refused(changes: dict[str, Any], said: str):
    weights = {"in_proj_weight": torch.zeros(48, 16), "out_proj.weight": torch.zeros(16, 16)}
    given = {"embed_dim": 16, "num_heads": 2, "bias": False}
    convert("torch.nn.MultiheadAttention", given, weights)
    with pytest.raises(ReferenceMismatch, match=said):
        convert("torch.nn.MultiheadAttention", given | changes, weights)


@pytest.mark.parametrize(
    ("layer_changes", "inner", "said"),
    [
        ({}, {}, "attention_dropout=0.1, its default, is not reproduced"),
        ({"d_values": 3}, {"attention_dropout": 0.0}, "d_values=3"),
        ({"d_model_keys": 3}, {"attention_dropout": 0.0}, "d_model_keys=3"),
        ({"attention": "ReformerAttention"}, {"attention_dropout": 0.0}, "ReformerAttention"),
        ({}, {"attention_dropout": 0.0, "temperature": 1.0}, "'temperature' is not known"),
    ],
)
def test_options_of_full_attention_that_we_lack_are_refused(
    layer_changes: dict[str, Any], inner: dict[str, Any], said: str
):
    weights = {f"{part}_projection.weight": torch.zeros(8, 8) for part in ("query", "key", "value", "out")}
    weights |= {f"{part}_projection.bias": torch.zeros(8) for part in ("query", "key", "value", "out")}
    given = {"layer": {"d_model": 8, "n_heads": 2}, "inner": {"attention_dropout": 0.0, "softmax_temp": 0.5}}
    made, _ = convert("AttentionLayer(FullAttention)", given, weights)
    assert made.scale == 0.5
    changed = {"layer": given["layer"] | layer_changes, "inner": inner}
    with pytest.raises(ReferenceMismatch, match=said):
        convert("AttentionLayer(FullAttention)", changed, weights)
    with pytest.raises(ReferenceMismatch, match="AttentionLayer\\(FullAttention\\)"):
        convert("AttentionLayer(FullAtention)", given, weights)

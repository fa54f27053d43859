"""The language model around the mixers: the same model whichever way it is called."""

import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from zoo.models import LanguageModel, ModelConfig, ModelState
from zoo.models.generation import generate_bytes
from zoo.registry import registry

from installed_mixers import small  # noqa: F401
from sequence_mixer.errors import ConfigError, DtypeError, ShapeError, StateError, UnsupportedCapability

LAYERS = "small_decay, small_mean, small_decay"
pytestmark = pytest.mark.usefixtures("small")


def model_of(layers: Any = LAYERS, **fields: Any) -> LanguageModel:
    return LanguageModel(ModelConfig.of(**{"d_model": 32, "layers": layers, **fields})).double().eval()


@pytest.fixture
def model() -> LanguageModel:
    return model_of()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(256, (2, 19), generator=torch.Generator().manual_seed(1))


def test_logits_of_early_tokens_do_not_depend_on_later_ones(model: LanguageModel, tokens: torch.Tensor) -> None:
    changed = tokens.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 256
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 19, 256)
    torch.testing.assert_close(before[:, :11], after[:, :11], rtol=0, atol=1e-12)
    assert (before[:, 11:] - after[:, 11:]).abs().max() > 1e-3


def test_earlier_tokens_reach_later_logits(model: LanguageModel, tokens: torch.Tensor) -> None:
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 256
    assert (model(tokens)[:, 5] - model(changed)[:, 5]).abs().max() > 1e-9


@pytest.mark.parametrize("pieces", [[19], [1] * 19, [2, 5, 1, 0, 11]])
def test_extend_in_pieces_equals_forward(model: LanguageModel, tokens: torch.Tensor, pieces: list[int]) -> None:
    state, out = model.initial_state(2), []
    for piece in tokens.split(pieces, dim=1):
        logits, state = model.extend(piece, state)
        out.append(logits)
    torch.testing.assert_close(torch.cat(out, 1), model(tokens), rtol=0, atol=1e-12)


def test_packed_sequences_equal_separate_ones(model: LanguageModel, tokens: torch.Tensor) -> None:
    packed = model(tokens[:1], cu_seqlens=torch.tensor([0, 7, 7, 19]))
    apart = torch.cat([model(tokens[:1, :7]), model(tokens[:1, 7:])], 1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-12)


def test_padding_does_not_change_the_logits_of_real_tokens(model: LanguageModel, tokens: torch.Tensor) -> None:
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0, 12:] = False
    mask[1, :4] = False
    logits = model(tokens, padding_mask=mask)
    torch.testing.assert_close(logits[:1, :12], model(tokens[:1, :12]), rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[1:, 4:], model(tokens[1:, 4:]), rtol=0, atol=1e-12)


def test_model_state_has_the_methods_of_a_state(model: LanguageModel, tokens: torch.Tensor) -> None:
    _, state = model.extend(tokens, model.initial_state(2))
    assert len(state) == 3
    assert state.nbytes == 3 * 2 * 32 * 8
    assert state.batch_size == 2
    assert state.to(dtype=torch.float32)[0].total.dtype == torch.float32
    assert state[0].total.requires_grad
    assert not state.detach()[0].total.requires_grad
    swapped = state.index_select(torch.tensor([1, 0]))
    torch.testing.assert_close(swapped[2].total, state[2].total[[1, 0]])
    both = state.concat(swapped)
    assert both.batch_size == 4
    leaves, spec = pytree.tree_flatten(state)
    assert len(leaves) == 3
    assert isinstance(pytree.tree_unflatten(leaves, spec), ModelState)


def test_reordered_state_continues_reordered_sequences(model: LanguageModel, tokens: torch.Tensor) -> None:
    _, state = model.extend(tokens[:, :9], model.initial_state(2))
    order = torch.tensor([1, 0, 1])
    forked, _ = model.extend(tokens[order, 9:], state.index_select(order))
    straight, _ = model.extend(tokens[:, 9:], state)
    torch.testing.assert_close(forked, straight[order], rtol=0, atol=1e-12)


def test_every_registered_mixer_serves_as_a_layer(tokens: torch.Tensor) -> None:
    served = []
    for name in registry.names():
        definition = registry.definition(name)
        fields = {key: value for key, value in definition.examples["default"].items() if key != "d_model"}
        if not definition.capabilities.causal and "causal" in definition.config.model_fields:
            fields["causal"] = True
        model = model_of([{"name": name, **fields}, "small_mean"], d_model=64)
        logits = model(tokens)
        assert logits.shape == (2, 19, 256), name
        assert model.config.masked == (not model.mixers[0].capabilities.causal), name
        if model.mixers[0].capabilities.stateful:
            state, out = model.initial_state(2), []
            for piece in tokens.split([4, 1, 14], dim=1):
                piece_logits, state = model.extend(piece, state)
                out.append(piece_logits)
            torch.testing.assert_close(torch.cat(out, 1), logits, rtol=1e-9, atol=1e-9, msg=name)
        served.append(name)
    assert served == registry.names()


BOTH_SIDES: dict[str, Any] = {
    "alone": ["linformer"],
    "hybrid": ["small_decay", {"name": "linformer", "max_length": 64, "rank": 8}, "attention"],
    "by option": [{"name": "mlp_mixer", "max_length": 32}],
}


@pytest.mark.parametrize("kind", BOTH_SIDES)
def test_a_layer_that_sees_both_sides_makes_a_model_of_masked_tokens(kind: str, tokens: torch.Tensor) -> None:
    model = model_of(BOTH_SIDES[kind], d_model=64)
    assert model.config.masked
    assert model.mask_token == 256
    hidden = tokens.clone()
    hidden[:, 5] = 256
    changed = hidden.clone()
    changed[:, 11] = (changed[:, 11] + 1) % 256
    before, after = model(hidden), model(changed)
    assert before.shape == (2, 19, 256)
    assert (before[:, 5] - after[:, 5]).abs().max() > 1e-9
    with pytest.raises(
        ShapeError, match=r"range from \d+ to 257, wanted 0 to vocab_size - 1 = 255, or mask_token = 256"
    ):
        model(hidden.clamp(min=1) + (hidden == 256))


def test_the_mask_token_has_an_embedding_of_its_own_and_hides_what_stood_there(tokens: torch.Tensor) -> None:
    model, other = model_of(objective="masked"), (tokens + 1) % 256
    places = torch.arange(19).expand(2, 19) % 3 == 1
    mixed = torch.where(places, other, tokens)
    assert torch.equal(model(mixed.masked_fill(places, 256)), model(tokens.masked_fill(places, 256)))
    model(tokens.masked_fill(places, 256)).sum().backward()
    assert model.mask_embedding is not None
    assert model.mask_embedding.grad is not None
    assert model.mask_embedding.grad.abs().max() > 0
    assert model_of().mask_embedding is model_of().mask_token is None


def test_a_causal_layer_of_a_masked_model_sees_the_left_alone(tokens: torch.Tensor) -> None:
    model, changed = model_of(objective="masked"), tokens.clone()
    changed[:, 11:] = 256
    torch.testing.assert_close(model(tokens)[:, :11], model(changed)[:, :11], rtol=0, atol=1e-12)


def test_the_objective_adds_nothing_to_a_model_of_next_tokens(tokens: torch.Tensor) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        plain = model_of()
        torch.manual_seed(5)
        asked = model_of(objective="next")
    assert "mask_embedding" not in plain.state_dict()
    assert torch.equal(plain(tokens), asked(tokens))


def test_layerwise_sharing_has_one_projection_for_the_masked_net(tokens: torch.Tensor) -> None:
    shared = {"linformer": {"share": "layerwise", "max_length": 32, "rank": 8}}
    model = model_of("linformer, small_decay, linformer", d_model=64, mixers=shared)
    first, second = (dict(model.mixers[index].named_parameters()) for index in (0, 2))
    (name,) = [name for name in first if first[name] is second[name]]
    assert sorted(first[name].shape[-2:]) == [8, 32]
    model(tokens).sum().backward()
    assert first[name].grad is not None
    own = model_of("linformer*2", d_model=64, mixers={"linformer": {"max_length": 32, "rank": 8}})
    assert len(list(own.parameters())) == len(list(model_of("linformer*2", d_model=64, mixers=shared).parameters())) + 3


@pytest.mark.parametrize(
    ("layers", "fields"),
    [(["linformer"], {}), (LAYERS, {"objective": "masked"}), (["small_decay", "linformer"], {})],
)
def test_a_model_of_masked_tokens_does_not_generate(layers: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="predicts masked bytes from both sides and cannot go on from a text"):
        generate_bytes(model_of(layers, d_model=64, **fields), b"x", 1)


@pytest.mark.parametrize(
    ("layer", "advice"),
    [({"name": "small_decay", "causal": False}, "set causal: true"), ({"name": "linformer"}, "take a causal mixer")],
)
def test_layer_that_is_not_causal_is_refused_in_a_model_of_next_tokens(layer: dict[str, Any], advice: str) -> None:
    told = f"layer 1 ({layer['name']}) is not causal"
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        model_of(["small_mean", layer], d_model=64, objective="next")
    assert f"{advice}, or objective: masked" in str(caught.value)


def test_layer_without_a_state_is_refused_by_number_and_name(tokens: torch.Tensor) -> None:
    model = model_of(["small_mean", {"name": "small_decay", "stateful": False}])
    assert model(tokens).shape == (2, 19, 256)
    with pytest.raises(UnsupportedCapability, match="it is layer 1 of the model"):
        model.initial_state(1)


def test_shared_modules_are_one_module_for_the_whole_net() -> None:
    model = model_of("a*3", mixers={"a": {"name": "small_decay", "share": True}})
    assert len({id(mixer.out) for mixer in model.mixers}) == 1
    other = model_of("a*3", mixers={"a": {"name": "small_decay", "share": True}})
    assert other.mixers[0].out is not model.mixers[0].out


def test_options_shape_the_model() -> None:
    assert model_of(mlp_ratio=0).blocks[0].mlp is None
    assert model_of(mlp_ratio=1.5).blocks[0].mlp.out.weight.shape == (32, 48)  # type: ignore[union-attr]
    tied, untied = model_of(), model_of(tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight


def test_dropout_acts_in_training_only(tokens: torch.Tensor) -> None:
    model = model_of(dropout=0.5)
    torch.testing.assert_close(model(tokens), model(tokens), rtol=0, atol=0)
    model.train()
    assert (model(tokens) - model(tokens)).abs().max() > 1e-3


def test_after_step_and_hints_reach_every_mixer() -> None:
    model = model_of()
    model.after_step(7)
    assert [mixer.calls for mixer in model.mixers] == [[7]] * 3
    assert sorted(model.parameter_groups()) == [f"layers.{i}.mixer.into.weight" for i in range(3)]
    with pytest.raises(ConfigError, match=re.escape("layer 0 (small_mean) gives an optimiser hint for 'inot.weight'")):
        model_of([{"name": "small_mean", "bad_hint": True}]).parameter_groups()


def test_wrong_tokens_and_states_are_told_in_words(model: LanguageModel, tokens: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=re.escape("wanted [B, T]")):
        model(tokens[0])
    with pytest.raises(DtypeError, match=re.escape("tokens is torch.float32")):
        model(tokens.float())
    with pytest.raises(ShapeError, match="range from 0 to 256, wanted 0 to vocab_size - 1 = 255"):
        model(torch.tensor([[0, 256]]))
    with pytest.raises(StateError, match="wanted a ModelState of 3 layers"):
        model.extend(tokens, model.initial_state(2).layers)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="batch 1, the input has 2"):
        model.extend(tokens, model.initial_state(1))


def test_config_and_weights_survive_pickling(model: LanguageModel, tokens: torch.Tensor) -> None:
    copy = pickle.loads(pickle.dumps(model))
    assert copy.config == model.config
    torch.testing.assert_close(copy(tokens), model(tokens), rtol=0, atol=0)


def test_generation_takes_the_bytes_that_forward_finds_likeliest(model: LanguageModel) -> None:
    sharpen(model)
    made = list(generate_bytes(model, b"abc", 12, temperature=0))
    text = list(b"abc")
    for byte in made:
        assert byte == int(model(torch.tensor([text]))[0, -1].argmax())
        text.append(byte)


def test_generation_is_a_function_of_the_seed_and_leaves_the_mode(model: LanguageModel) -> None:
    model.train()
    first = list(generate_bytes(model, b"", 30, seed=3))
    assert list(generate_bytes(model, b"", 30, seed=3)) == first
    assert list(generate_bytes(model, b"", 30, seed=4)) != first
    assert model.training
    assert list(generate_bytes(model, b"x", 0)) == []


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"tokens": -1}, "tokens=-1"),
        ({"tokens": 2, "temperature": -0.1}, "temperature=-0.1"),
        ({"tokens": 2, "temperature": float("nan")}, "temperature=nan"),
        ({"tokens": 99}, "max_length=64, the prompt with what is generated has 100 tokens"),
    ],
)
def test_generation_refuses_in_words_before_it_starts(asked: dict[str, Any], told: str) -> None:
    model = model_of([{"name": "small_decay", "max_length": 64}])
    with pytest.raises(ConfigError, match=re.escape(told)):
        generate_bytes(model, b"x", **asked)


def sharpen(model: nn.Module) -> None:
    """Weights large enough that the likeliest byte is no tie."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)

"""The Linformer layer: its equations, sharing, padding, matrix, recorded layers, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.dispatch import record_dispatch
from zoo.ops.linformer_attention import MAX_TILE_BYTES, MOST_ROWS, WIDEST, fits_on_chip

from golden import load_case
from layers import EXACT, PADS, agree, build, expect_recorded, padded, tokens, with_gradients
from sequence_mixer.definition import RowStochastic
from sequence_mixer.errors import LengthError, ReferenceMismatch, UnsupportedCapability
from zoo_linformer import EXAMPLES, KERNEL_ROWS, KERNEL_TILE_BYTES, KERNEL_WIDEST, zoo_register_mixers
from zoo_linformer.config import LinformerConfig
from zoo_linformer.from_reference import convert
from zoo_linformer.mixer import LinformerMixer
from zoo_linformer.reference import linformer_layer

DEFINITION = zoo_register_mixers()[0]
SMALL: dict[str, Any] = {"d_model": 16, "n_heads": 2, "max_length": 12, "rank": 4}


def layer(example: str = "default", backend: str = "auto") -> LinformerMixer:
    mixer = build(DEFINITION, example)
    assert isinstance(mixer, LinformerMixer)
    mixer.backend = backend
    return mixer


def made(shared: dict[str, Any] | None = None, **options: Any) -> LinformerMixer:
    mixer = DEFINITION.make(LinformerConfig(**SMALL | options), shared)
    assert isinstance(mixer, LinformerMixer)
    return mixer


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("length", [1, 7, 67, 100])
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_layer_equals_its_equations(example: str, length: int, backend: str):
    mixer, x = layer(example, backend), tokens(2, length).requires_grad_()
    cotangent = tokens(2, length)
    wanted = linformer_layer(mixer.config, dict(mixer.named_parameters()), x)
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
def test_the_matrix_form_is_the_layer_and_has_the_declared_rank(example: str):
    mixer, x = layer(example), tokens(2, 40)
    form = mixer.matrix_form(x)
    torch.testing.assert_close(form.apply(), mixer(x), **EXACT)
    matrix = form.matrix
    torch.testing.assert_close(form.heads(slice(1, 3)), matrix[:, 1:3], **EXACT)
    rank = mixer.config.projected
    assert int(torch.linalg.matrix_rank(matrix[:, :4], rtol=1e-10).max()) <= rank
    stochastic = RowStochastic() in mixer.capabilities.structures
    assert stochastic == (mixer.config.projection in ("mean_pool", "max_pool"))
    sums = matrix.sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums)) == stochastic


def test_a_rank_is_reached():
    x = tokens(1, 60)
    ranks = torch.linalg.matrix_rank(layer("every_head").matrix_form(x).matrix, rtol=1e-10)
    assert ranks.flatten().tolist() == [12] * 4


@pytest.mark.parametrize(
    ("share", "shapes"),
    [
        ("none", {"proj_k": [2, 12, 4], "proj_v": [2, 12, 4]}),
        ("headwise", {"proj_k": [12, 4], "proj_v": [12, 4]}),
        (None, {"proj_k": [12, 4], "proj_v": [12, 4]}),
        ("kv", {"proj_k": [12, 4]}),
        ("layerwise", {"proj_k": [12, 4]}),
    ],
)
def test_modes_of_sharing_hold_the_matrices_of_the_paper(share: str | None, shapes: dict[str, list[int]]):
    for projection, cut in (("linear", slice(None)), ("convolution", slice(-1))):
        mixer = made(share=share, projection=projection)
        found = {name: list(p.shape) for name, p in mixer.named_parameters() if name.startswith("proj_")}
        window = [] if projection == "linear" else [3]
        wanted = {name: shape if not window else [*shape[cut][:-1], *window] for name, shape in shapes.items()}
        assert found == wanted
        bound = (4 if projection == "linear" else 3) ** -0.5
        assert all(float(getattr(mixer, name).detach().abs().max()) <= bound for name in shapes)


@pytest.mark.parametrize("projection", ["linear", "convolution"])
def test_layers_of_one_size_share_one_projection_of_the_net(projection: str):
    shared: dict[str, Any] = {}
    one, two = (made(shared, share="layerwise", projection=projection) for _ in range(2))
    other = made(shared, share="layerwise", projection=projection, max_length=24, rank=8)
    alone = made(share="layerwise", projection=projection)
    assert one.proj_k is two.proj_k
    assert one.proj_k is not alone.proj_k
    assert one.proj_k is not other.proj_k
    net = torch.nn.ModuleList([one, two]).double()
    assert one.proj_k is two.proj_k
    assert sum(p is one.proj_k for p in net.parameters()) == 1
    twin = copy.deepcopy(net)
    assert twin[0].proj_k is twin[1].proj_k
    x = tokens(1, 9, 16)
    two(one(x)).sum().backward()
    assert one.proj_k is not None
    apart = copy.deepcopy(two)
    apart.proj_k = torch.nn.Parameter(one.proj_k.detach().clone())
    first = copy.deepcopy(one)
    first.zero_grad()
    apart.zero_grad()
    apart(first(x)).sum().backward()
    assert first.proj_k is not None
    torch.testing.assert_close(one.proj_k.grad, first.proj_k.grad + apart.proj_k.grad)


def test_a_net_of_layers_is_built_with_one_projection():
    from zoo.build import create

    shared: dict[str, Any] = {}
    options = {**SMALL, "name": "linformer", "share": "layerwise"}
    layers = [create(options, shared=shared) for _ in range(12)]
    wide = [create({**options, "share": share}, shared=shared) for share in ("headwise", "none") for _ in range(12)]
    count = lambda net: sum("proj_k" in name or "proj_v" in name for name, _ in net.named_parameters())
    assert count(torch.nn.ModuleList(layers)) == 1
    assert count(torch.nn.ModuleList(wide[:12])) == 24


def test_kv_sharing_is_headwise_with_one_matrix():
    one, two = made(share="kv").double(), made(share="headwise").double()
    two.load_state_dict(one.state_dict() | {"proj_v": one.state_dict()["proj_k"]})
    x = tokens(2, 11, 16)
    torch.testing.assert_close(one(x), two(x), **EXACT)


def test_windows_of_one_token_are_attention():
    from zoo_attention import zoo_register_mixers as attention_mixers

    definition = attention_mixers()[0]
    attention = definition.make(
        definition.config(d_model=16, n_heads=2, causal=False, rope="none")  # type: ignore[call-arg]
    ).double()
    x = tokens(2, 9, 16)
    for projection in ("mean_pool", "max_pool"):
        mixer = made(projection=projection, rank=12, out_bias=False).double()
        mixer.load_state_dict(attention.state_dict())
        torch.testing.assert_close(mixer(x), attention(x), **EXACT)


def test_a_convolution_of_equal_taps_is_the_mean():
    mean, taps = made(projection="mean_pool").double(), made(projection="convolution", share="kv").double()
    taps.load_state_dict(mean.state_dict() | {"proj_k": torch.full((3,), 1 / 3, dtype=torch.float64)})
    x = tokens(2, 12, 16)
    torch.testing.assert_close(mean(x), taps(x), **EXACT)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_cost_is_what_torch_counts(example: str):
    mixer = layer(example).float()
    cost = mixer.cost(2, 96, torch.float32)
    with FlopCounterMode(display=False) as counter:
        mixer(tokens(2, 96).float())
    assert abs(counter.get_total_flops() / cost.flops - 1) < 0.01
    assert cost.parameters == sum(parameter.numel() for parameter in mixer.parameters())
    assert cost.bytes == (cost.parameters + 2 * 2 * 96 * 64) * 4
    assert cost.state_elements == 0


def test_the_operators_are_called_with_the_backend_of_the_mixer():
    for example, op in (("headwise", "linformer_attention"), ("mean_pool", "softmax_attention")):
        with record_dispatch() as record:
            layer(example, "reference")(tokens(1, 5))
        assert [(each.op, each.backend) for each in record] == [(op, "reference")]


def test_backends_are_those_that_serve_the_config():
    assert (KERNEL_WIDEST, KERNEL_ROWS, KERNEL_TILE_BYTES) == (WIDEST, MOST_ROWS, MAX_TILE_BYTES)

    def served(**given: Any) -> dict[str, tuple[str, ...]]:
        able = DEFINITION.capabilities_of(LinformerConfig(d_model=1024, **given))
        return {spec.name: spec.dtypes for spec in able.backends}

    assert list(served()) == ["triton", "chunked", "reference"]
    assert served(rank=200)["triton"] == ("float32", "bfloat16", "float16")
    assert served(rank=300)["triton"] == ("bfloat16", "float16")
    assert "triton" not in served(rank=1000)
    assert "triton" not in served(n_heads=2)
    assert list(served(projection="mean_pool")) == ["triton", "sdpa", "chunked", "reference"]
    for rank in (1, 16, 17, 256, 257, 512):
        for size, dtype in ((4, "float32"), (2, "bfloat16")):
            assert (dtype in served(rank=rank).get("triton", ())) == fits_on_chip(rank, 64, size)
    assert "triton" in served(head_dim=16, max_length=5000, rank=1024)
    assert "triton" not in served(head_dim=16, max_length=5000, rank=1025)


def test_causal_is_refused_with_the_reason():
    import zoo

    for build_one in (
        lambda: LinformerConfig(d_model=64, causal=True),
        lambda: LinformerConfig(d_model=64).model_copy(update={"causal": True}),
        lambda: LinformerConfig.model_validate_json('{"d_model": 64, "causal": true}'),
    ):
        with pytest.raises(UnsupportedCapability, match="mixes the tokens of the whole sequence"):
            build_one()
    with pytest.raises(UnsupportedCapability, match="causal"):
        zoo.create("linformer", d_model=64, causal=True)
    assert LinformerConfig(d_model=64, causal=False) == LinformerConfig(d_model=64)
    with pytest.raises(ValidationError, match="causal"):
        LinformerConfig(d_model=64, causal="no")


def test_bad_configs_and_calls_are_refused_in_words():
    for given, said in (
        ({"n_heads": 3}, "not a multiple of n_heads=3"),
        ({"n_heads": 4, "n_kv_heads": 3}, "not a multiple of n_kv_heads=3"),
        ({"share": "all"}, "layerwise"),
        ({"share": "kv", "projection": "mean_pool"}, "needs weights to share"),
        ({"max_length": 8, "rank": 9, "projection": "convolution"}, "do not fit into max_length=8"),
        ({"k": 9}, "k"),
    ):
        with pytest.raises(ValidationError, match=said):
            LinformerConfig(**{"d_model": 64, **given})
    with pytest.raises(LengthError, match="max_length is 128"):
        layer("headwise")(tokens(1, 129))
    with pytest.raises(UnsupportedCapability, match="stateful"):
        layer("headwise").extend(tokens(1, 3), None)
    with pytest.raises(UnsupportedCapability, match="varlen"):
        layer("headwise")(tokens(1, 3), cu_seqlens=torch.tensor([0, 3]))


def test_defaults_follow_the_length():
    assert LinformerConfig(d_model=64).projected == 256
    for length in (1, 100, 300, 5000):
        config = LinformerConfig(d_model=64, max_length=length)
        assert config.projected == min(256, length)
        pooled = LinformerConfig(d_model=64, max_length=length, projection="mean_pool")
        assert (pooled.projected - 1) * pooled.window < length <= pooled.projected * pooled.window
        assert pooled.projected <= min(256, length)


def parts(config: dict[str, Any]) -> dict[str, tuple[str, slice]]:
    """Their weights as rows of ours."""
    inner = config["dim"]
    width = inner // config["heads"]
    keys = width if config["one_kv_head"] else inner
    found = {
        "to_q.weight": ("in_proj.weight", slice(inner)),
        "to_k.weight": ("in_proj.weight", slice(inner, inner + keys)),
        "to_out.weight": ("out_proj.weight", slice(None)),
        "to_out.bias": ("out_proj.bias", slice(None)),
        "proj_k": ("proj_k", slice(None)),
    }
    if not config["share_kv"]:
        found["to_v.weight"] = ("in_proj.weight", slice(inner + keys, None))
        found["proj_v"] = ("proj_v", slice(None))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("name", ["linformer", "linformer_one_kv_head", "linformer_share_kv", "linformer_short_input"])
def test_recorded_layers_come_back(name: str, backend: str, dtype: torch.dtype):
    from layers import from_case

    case = load_case(name)
    mixer = from_case("linformer", case, dtype)
    mixer.backend = backend
    expect_recorded(case, mixer, dtype, parts(case.config))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dropout": 0.1}, "dropout=0.1 is not reproduced"),
        ({"heads": 3}, "n_heads=3"),
        ({"depth": 2}, "'depth' is not known"),
        ({"share_kv": True}, "not known: to_v.weight, proj_v"),
        ({"k": 0}, "rank"),
    ],
)
def test_options_that_we_lack_are_refused(changes: dict[str, Any], said: str):
    given = {"dim": 8, "seq_len": 6, "k": 3, "heads": 2}
    weights: dict[str, Tensor] = {f"to_{name}.weight": torch.zeros(8, 8) for name in ("q", "k", "v", "out")}
    weights |= {"to_out.bias": torch.zeros(8), "proj_k": torch.zeros(6, 3), "proj_v": torch.zeros(6, 3)}
    config, named = convert("LinformerSelfAttention", given, weights)
    assert (config.max_length, config.rank, config.sharing, config.tie_values) == (6, 3, "headwise", False)
    DEFINITION.make(config).load_state_dict(named)
    with pytest.raises(ReferenceMismatch, match=said):
        convert("LinformerSelfAttention", given | changes, weights)
    with pytest.raises(ReferenceMismatch, match="'seq_len' is missing"):
        convert("LinformerSelfAttention", {"dim": 8}, weights)
    with pytest.raises(ReferenceMismatch, match="LinformerSelfAttention"):
        convert("Linformer", given, weights)

"""The linear attention operator: recorded outputs, its forms against the definition, packing, padding, errors."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from zoo.ops import linear_attention, record_dispatch
from zoo.ops.linear_attention import FEATURE_MAPS, flops

from golden import load_case
from sequence_mixer.conformance.budget import judge, rms
from sequence_mixer.errors import BackendError, ConfigError, DtypeError, PackingError, ShapeError

BACKENDS = ["reference", "chunked"]
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 97, 130]
PACKED = [0, 0, 5, 69, 69, 70, 134, 151, 151]
NORMALISED = {"feature_map": "elu_plus_one", "normalize": True}
FORMS = {
    "plain": {},
    "head-decay": {"decay": "head"},
    "channel-decay": {"decay": "channel"},
    "normalised": NORMALISED,
    "normalised-head-decay": NORMALISED | {"decay": "head"},
    "normalised-channel-decay": NORMALISED | {"decay": "channel"},
    "whole": {"causal": False, "feature_map": "silu", "scale": 0.3},
    "whole-normalised": NORMALISED | {"causal": False},
}


def inputs_of(
    tokens: int,
    *,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    width: int = 5,
    channels: int = 3,
    keys: int | None = None,
    sequences: int | None = None,
    decay: str = "none",
    causal: bool = True,
    normalize: bool = False,
    state: bool = True,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> dict[str, Tensor]:
    """Tensor arguments of `linear_attention` by name; float64 values that are exact in `dtype`."""
    source = tokens if keys is None else keys
    shapes = {
        "q": (batch, tokens, heads, width),
        "k": (batch, source, groups, width),
        "v": (batch, source, groups, channels),
    }
    if decay != "none":
        shapes["log_decay"] = (batch, tokens, heads, width) if decay == "channel" else (batch, tokens, heads)
    if state and causal:
        shapes["initial_state"] = (sequences or batch, heads, width, channels + normalize)
    made = {name: torch.randn(shape, dtype=torch.float64).to(dtype).double() for name, shape in shapes.items()}
    if decay != "none":
        made["log_decay"] = -made["log_decay"].abs()
    if normalize and "initial_state" in made:
        made["initial_state"][..., -1].abs_()
    return made


def run(
    given: dict[str, Tensor], backend: str, dtype: torch.dtype = torch.float64, **options: object
) -> dict[str, Tensor]:
    """y, final_state and gradients of a fixed random loss, by name; half precision keeps decay and state in float32."""
    options.pop("decay", None)
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        name: value.to(dtype if name in "qkv" else inner, copy=True).requires_grad_() for name, value in given.items()
    }
    named = {name: leaf for name, leaf in leaves.items() if name not in "qkv"}
    y, final_state = linear_attention(leaves["q"], leaves["k"], leaves["v"], **named, backend=backend, **options)
    return {"y": y, "final_state": final_state} | gradients(y, final_state, leaves)


def gradients(y: Tensor, final_state: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    seeded = torch.Generator().manual_seed(7)
    w, ws = (torch.randn(part.shape, generator=seeded, dtype=torch.float64) for part in (y, final_state))
    loss = (y * w.to(y)).sum() + (final_state * ws.to(final_state)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {f"grad.{name}": grad for name, grad in zip(leaves, found, strict=True)}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], limit: float = 1e-12) -> None:
    """Relative RMS errors within `limit`; a gradient that cancels to nearly 0 is measured against 1e-3 instead."""
    for name, exact in other.items():
        assert one[name].shape == exact.shape, name
        error = rms(one[name] - exact) / max(rms(exact), 1e-3)
        assert error <= limit, f"{name}: {error:.2e}"


def leaves_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Recorded inputs as leaves, by the name that their gradient is recorded under."""
    named = {
        name.removeprefix("in."): value for name, value in tensors.items() if name.startswith(("in.", "initial_state"))
    }
    return {name: value.clone().requires_grad_() for name, value in named.items()}


def assert_recorded(y: Tensor, final_state: Tensor, leaves: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    loss = (y * tensors["w"]).sum()
    found = {"y": y}
    if "w_final_state" in tensors:
        loss = loss + (final_state * tensors["w_final_state"]).sum()
        found["final_state"] = final_state
    found |= {f"grad.{name}": grad for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())))}
    assert_same(found, {name: tensors[name] for name in found}, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["linear_attn_op_causal", "linear_attn_op_bidir"])
def test_normalised_attention_agrees_with_the_recorded_operator(name: str, backend: str) -> None:
    case = load_case(name)
    leaves = leaves_of(case.tensors)
    y, final_state = linear_attention(
        leaves["queries"], leaves["keys"], leaves["values"],
        causal=case.config["causal"], eps=case.config["eps"], backend=backend, **NORMALISED,
    )  # fmt: skip
    assert_recorded(y, final_state, leaves, case.tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["linear_attn_fla", "simple_gla", "gla", "gla_plain"])
def test_attention_without_a_map_agrees_with_the_recorded_operator(name: str, backend: str) -> None:
    case = load_case(name)
    leaves = leaves_of(case.tensors)
    y, final_state = linear_attention(
        leaves["q"], leaves["k"], leaves["v"],
        log_decay=leaves.get("g", leaves.get("gk")), initial_state=leaves.get("initial_state"),
        scale=case.config["K"] ** -0.5, backend=backend,
    )  # fmt: skip
    assert_recorded(y, final_state, leaves, case.tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_retention_agrees_with_the_recorded_operator(backend: str) -> None:
    case = load_case("retnet")
    leaves = leaves_of(case.tensors)
    q, k, v = (leaves[name].transpose(1, 2) for name in "qkv")
    log_decay = torch.log1p(-(2.0 ** (-5.0 - torch.arange(3, dtype=torch.float64)))).expand(*q.shape[:3])
    y, state = linear_attention(q, k, v, log_decay=log_decay, scale=case.config["K"] ** -0.5, backend=backend)
    assert_recorded(y.transpose(1, 2), state, leaves, case.tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_causal_product_agrees_with_the_recorded_operator(backend: str) -> None:
    case = load_case("causal_product")
    leaves = leaves_of(case.tensors)
    y, state = linear_attention(*(leaves[name].transpose(1, 2) for name in "QKV"), backend=backend)
    assert_recorded(y.transpose(1, 2), state, leaves, case.tensors)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_chunked_path_agrees_with_the_definition(tokens: int, form: str) -> None:
    given = inputs_of(tokens, **FORMS[form])
    assert_same(run(given, "chunked", **FORMS[form]), run(given, "reference", **FORMS[form]))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("form", ["head-decay", "channel-decay", "whole"])
def test_every_feature_map_agrees_with_the_definition(feature_map: str, form: str) -> None:
    options = FORMS[form] | {"feature_map": feature_map, "scale": 0.4}
    given = inputs_of(40, groups=1, **options)
    assert_same(run(given, "chunked", **options), run(given, "reference", **options))


@pytest.mark.parametrize("form", ["plain", "channel-decay", "normalised-head-decay", "normalised-channel-decay"])
def test_many_chunks_are_carried_exactly(form: str) -> None:
    given = inputs_of(16 * 37 + 5, batch=1, **FORMS[form])
    assert_same(run(given, "chunked", **FORMS[form]), run(given, "reference", **FORMS[form]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_attention_is_the_masked_matrix_of_products(form: str, backend: str) -> None:
    options = dict(FORMS[form])
    given = inputs_of(23, groups=4, state=False, **options)
    y = run(given, backend, **options)["y"]
    phi = FEATURE_MAPS[options.get("feature_map", "identity")]
    products = torch.einsum("bihn,bjhn->bhijn", phi(given["q"]), phi(given["k"])) * options.get("scale", 1.0)
    if "log_decay" in given:
        decay = given["log_decay"] if given["log_decay"].dim() == 4 else given["log_decay"].unsqueeze(-1)
        sums = decay.cumsum(1).movedim(1, 2)
        products = products * (sums.unsqueeze(3) - sums.unsqueeze(2)).exp()
    matrix = products.sum(-1)
    matrix = matrix.tril() if options.get("causal", True) else matrix
    if options.get("normalize"):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + 1e-6)
    assert_same({"y": y}, {"y": torch.einsum("bhij,bjhp->bihp", matrix, given["v"])})


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ends", [PACKED, [0, 3, 3], [0, 1], [0, 0, 1], [0, 64, 128], [0, 200], list(range(40))])
def test_a_packed_row_equals_separate_sequences(ends: list[int], form: str, state: bool) -> None:
    options = FORMS[form]
    given = inputs_of(ends[-1], batch=1, sequences=len(ends) - 1, state=state, **options)
    packing = torch.tensor(ends, dtype=torch.int32)
    packed = run(given, "chunked", cu_seqlens=packing, **options)
    assert_same(packed, run(given, "reference", cu_seqlens=packing, **options))
    for s, (a, b) in enumerate(itertools.pairwise(ends)):
        alone = {name: value[:, a:b] for name, value in given.items()}
        if "initial_state" in given:
            alone["initial_state"] = given["initial_state"][s : s + 1]
        result = run(alone, "chunked", **options)
        assert_same({"y": packed["y"][:, a:b], "final_state": packed["final_state"][s : s + 1]},
                    {key: result[key] for key in ("y", "final_state")})  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_padding_equals_the_unpadded_rows(form: str, backend: str) -> None:
    options = FORMS[form]
    given = inputs_of(70, batch=3, **options)
    real = [(0, 70), (9, 70), (0, 33)]
    mask = torch.zeros(3, 70, dtype=torch.bool)
    for row, (a, b) in enumerate(real):
        mask[row, a:b] = True
    dirty = {
        name: value if name == "initial_state" else value.clone().masked_fill_(
            ~mask.reshape(3, 70, *[1] * (value.dim() - 2)), math.nan)
        for name, value in given.items()
    }  # fmt: skip
    padded = run(dirty, backend, padding_mask=mask, **options)
    assert bool((padded["y"][~mask] == 0).all())
    for name in dirty:
        assert bool(padded[f"grad.{name}"].isfinite().all()), name
        if name != "initial_state":
            assert bool((padded[f"grad.{name}"][~mask] == 0).all()), name
    for row, (a, b) in enumerate(real):
        alone = {
            name: value[row : row + 1] if name == "initial_state" else value[row : row + 1, a:b]
            for name, value in given.items()
        }
        result = run(alone, "reference", **options)
        assert_same({"y": padded["y"][row : row + 1, a:b], "final_state": padded["final_state"][row : row + 1]},
                    {key: result[key] for key in ("y", "final_state")})  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_may_read_another_sequence_with_padded_keys(backend: str) -> None:
    given = inputs_of(7, keys=12, causal=False)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 8:] = False
    result = run(given, backend, causal=False, padding_mask=mask, **NORMALISED)
    alone = {name: value[1:, :8] if name != "q" else value[1:] for name, value in given.items()}
    assert_same({"y": result["y"][1:]}, {"y": run(alone, "reference", causal=False, **NORMALISED)["y"]})


@pytest.mark.parametrize("form", [form for form, options in FORMS.items() if options.get("causal", True)])
def test_a_split_sequence_passes_its_state_on(form: str) -> None:
    options = {key: value for key, value in FORMS[form].items() if key != "decay"}
    given = inputs_of(100, state=False, **FORMS[form])
    whole = linear_attention(**given, **options)
    state, parts = None, []
    for a, b in itertools.pairwise([0, 1, 2, 66, 67, 100]):
        cut = {key: value[:, a:b] for key, value in given.items()}
        y, state = linear_attention(**cut, initial_state=state, **options)
        parts.append(y)
    assert_same({"y": torch.cat(parts, 1), "final_state": state}, {"y": whole[0], "final_state": whole[1]})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packing", [None, torch.tensor([0, 0, 0])])
@pytest.mark.parametrize("form", FORMS)
def test_an_empty_input_returns_its_state(form: str, packing: Tensor | None, backend: str) -> None:
    batch = 2 if packing is None else 1
    options = {key: value for key, value in FORMS[form].items() if key != "decay"}
    given = inputs_of(0, batch=batch, sequences=2, **FORMS[form])
    y, final_state = linear_attention(**given, cu_seqlens=packing, backend=backend, **options)
    assert y.shape == (batch, 0, 4, 3)
    expected = given.get("initial_state", torch.zeros(2, 4, 5, 3 + options.get("normalize", False)))
    assert torch.equal(final_state, expected.to(final_state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_the_chunked_path_keeps_the_digits_of_its_dtype(form: str, dtype: torch.dtype) -> None:
    options = FORMS[form]
    given = inputs_of(150, width=16, channels=8, dtype=dtype, **options)
    exact, plain = run(given, "reference", **options), run(given, "chunked", dtype, **options)
    for name, value in plain.items():
        verdict = judge(value, exact[name], None, dtype)
        assert verdict.ok, f"{name}: {verdict}"
    assert plain["y"].dtype == dtype
    assert plain["final_state"].dtype == torch.float32


@pytest.mark.parametrize("form", ["head-decay", "channel-decay"])
@pytest.mark.parametrize("strength", [1.0, 40.0, 1000.0])
def test_strong_decays_neither_overflow_nor_lose_digits(strength: float, form: str) -> None:
    given = inputs_of(150, **FORMS[form])
    given["log_decay"] = (given["log_decay"] * strength).float().double()
    given["log_decay"][:, ::9] = -torch.inf
    given["log_decay"][:, 4::11] = -1e30
    given = {name: value.float().double() for name, value in given.items()}
    exact = run(given, "reference")
    assert_same(run(given, "chunked"), exact)
    assert_same(run(given, "chunked", torch.float32), exact, 5e-6)


def test_small_features_keep_their_digits_and_their_gradient() -> None:
    raw = torch.tensor([-80.0, -17.0, -4.0, 0.0, 0.5, 200.0], dtype=torch.float64)
    exact = torch.tensor([math.exp(x) if x <= 0 else x + 1 for x in raw.tolist()], dtype=torch.float64)
    leaf = raw.float().requires_grad_()
    mapped = FEATURE_MAPS["elu_plus_one"](leaf)
    assert float(((mapped.detach().double() - exact) / exact).abs().max()) < 1e-6
    (slope,) = torch.autograd.grad(mapped.sum(), leaf)
    assert torch.allclose(slope.double(), exact.where(raw <= 0, 1.0), rtol=1e-6, atol=0)


def test_scale_cancels_under_the_normaliser_except_against_eps() -> None:
    given = inputs_of(20, state=False)
    one = linear_attention(**given, **NORMALISED, eps=0.0)
    other = linear_attention(**given, **NORMALISED, eps=0.0, scale=0.125)
    assert_same(dict(enumerate(other)), dict(enumerate(one)))  # type: ignore[arg-type]
    weighed = linear_attention(**given, **NORMALISED, eps=0.5, scale=0.125)[0]
    assert_same({"y": weighed}, {"y": linear_attention(**given, **NORMALISED, eps=4.0)[0]})


@pytest.mark.parametrize("form", ["plain", "normalised-channel-decay", "whole-normalised"])
def test_the_reference_differentiates_twice(form: str) -> None:
    options = {key: value for key, value in FORMS[form].items() if key != "decay"}
    given = inputs_of(4, batch=1, heads=2, groups=1, width=2, channels=2, **FORMS[form])
    leaves = {name: value.requires_grad_() for name, value in given.items()}

    def call(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(**dict(zip(leaves, parts)), **options, backend="reference")

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()))


COMPILED = [(97, form, "packed") for form in FORMS]
COMPILED += [(97, form, "padded") for form in ("normalised-head-decay", "normalised-channel-decay", "whole-normalised")]
COMPILED += [(1, form, "rows") for form in ("normalised-head-decay", "normalised-channel-decay", "whole")]


@pytest.mark.parametrize(("tokens", "form", "packing"), COMPILED)
def test_the_chunked_path_compiles_without_a_graph_break(tokens: int, form: str, packing: str) -> None:
    options = {key: value for key, value in FORMS[form].items() if key != "decay"}
    if packing == "packed":
        options["cu_seqlens"] = torch.tensor([0, 0, tokens // 2, tokens])
    if packing == "padded":
        options["padding_mask"] = torch.arange(tokens).expand(2, -1) >= tokens // 2
    packed = packing == "packed"
    given = inputs_of(tokens, batch=1 if packed else 2, sequences=3 if packed else None, **FORMS[form])
    leaves = [value.requires_grad_() for value in given.values()]

    def call(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(**dict(zip(given, parts)), **options)

    torch._dynamo.reset()
    results = []
    for fn in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        y, state = fn(*leaves)
        results.append(dict(enumerate([y, state, *torch.autograd.grad(y.square().sum() + state.sum(), leaves)])))
    assert_same(results[1], results[0], 1e-13)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_inputs_need_not_be_contiguous(form: str) -> None:
    given = inputs_of(70, **FORMS[form])
    exact = run(given, "chunked", **FORMS[form])
    turned = {name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in given.items()}
    assert_same(run(turned, "chunked", **FORMS[form]), exact)


@pytest.mark.parametrize("form", ["normalised", "channel-decay", "whole-normalised"])
def test_autocast_does_not_reach_the_sums(form: str) -> None:
    options = {key: value for key, value in FORMS[form].items() if key != "decay"}
    given = {name: value.float() for name, value in inputs_of(70, **FORMS[form]).items()}
    outside = linear_attention(**given, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_attention(**given, **options)
    assert torch.equal(inside[0], outside[0])
    assert torch.equal(inside[1], outside[1])


def test_the_choice_is_recorded_once() -> None:
    with record_dispatch() as record:
        linear_attention(**inputs_of(3, state=False))
    assert [(entry.op, entry.backend) for entry in record] == [("linear_attention", "chunked")]
    assert "float64" in record[0].reasons["triton"] or "cpu" in record[0].reasons["triton"]


def test_bad_inputs_are_refused_in_words() -> None:
    given = inputs_of(6, decay="head")
    q, k, v, log_decay, state = given.values()
    with pytest.raises(ShapeError, match=r"k has shape \[2, 5, 2, 5\], wanted \[B=2, T=6, G, N=5\]"):
        linear_attention(q, k[:, :5], v[:, :5])
    with pytest.raises(ShapeError, match="v has shape"):
        linear_attention(q, k, v[:, :, :1])
    with pytest.raises(ShapeError, match="q has H=4 heads, wanted a multiple of the G=3"):
        linear_attention(q, k[:, :, :1].expand(-1, -1, 3, -1), v[:, :, :1].expand(-1, -1, 3, -1))
    with pytest.raises(ShapeError, match=r"log_decay has shape \[2, 6, 3\], wanted \[B=2, T=6, H=4\]"):
        linear_attention(q, k, v, log_decay=log_decay[:, :, :3])
    with pytest.raises(ShapeError, match=r"log_decay has shape \[2, 6, 4, 2\], wanted \[B=2, T=6, H=4, N=5\]"):
        linear_attention(q, k, v, log_decay=log_decay.unsqueeze(-1).expand(-1, -1, -1, 2))
    with pytest.raises(ShapeError, match=r"initial_state has shape \[2, 4, 5, 3\], wanted \[S=2, H=4, N=5, 4\]"):
        linear_attention(q, k, v, initial_state=state, normalize=True)
    with pytest.raises(DtypeError, match=r"k is torch\.float32"):
        linear_attention(q, k.float(), v)
    with pytest.raises(DtypeError, match=r"q is torch\.int64"):
        linear_attention(q.long(), k, v)
    with pytest.raises(ConfigError, match="no feature map named 'elu_plus_on'; did you mean elu_plus_one"):
        linear_attention(q, k, v, feature_map="elu_plus_on")
    with pytest.raises(ConfigError, match="log_decay came with causal=False"):
        linear_attention(q, k, v, log_decay=log_decay, causal=False)
    with pytest.raises(ConfigError, match="initial_state came with causal=False"):
        linear_attention(q, k, v, initial_state=state, causal=False)
    with pytest.raises(PackingError, match="has batch 2"):
        linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(PackingError, match="came together"):
        linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 6]), padding_mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(PackingError, match="has a hole"):
        linear_attention(q, k, v, padding_mask=torch.tensor([[True, False, True, True, True, True]] * 2))
    with pytest.raises(BackendError, match="did you mean chunked"):
        linear_attention(q, k, v, backend="chunkd")
    with pytest.raises(BackendError, match="triton: "):
        linear_attention(q, k, v, backend="triton")


def test_flops_follow_the_products() -> None:
    assert flops(1, 128, 4, 16, 8) == 2 * 128 * 4 * (64 * 16 + 64 * 8 + 2 * 16 * 8)
    assert flops(1, 128, 4, 16, 8, normalize=True) == 2 * 128 * 4 * (64 * 16 + 64 * 9 + 2 * 16 * 9)
    assert flops(2, 128, 4, 16, 8, channel_decay=True) == 4 * 128 * 4 * (16 * 16 + 16 * 8 + 2 * 16 * 8)
    assert flops(3, 50, 4, 16, 8, causal=False) == 4 * 3 * 50 * 4 * 16 * 8
    assert flops(3, 1, 4, 16, 8) == 3 * 4 * 4 * 16 * 8

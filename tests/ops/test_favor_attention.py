"""The FAVOR+ operator: its forms against the definition, running maxima, packing, padding, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops import record_dispatch
from zoo.ops.favor_attention import favor_attention, flops
from zoo.ops.favor_attention.features import FEATURES, feature_count, log_features, relu_features
from zoo.ops.favor_attention.outgrown import LIMIT

from sequence_mixer.conformance.budget import judge, relative_rms, rms
from sequence_mixer.errors import BackendError, ConfigError, DtypeError, PackingError, ShapeError

BACKENDS = ["reference", "chunked"]
LENGTHS = [1, 2, 5, 63, 64, 65, 130]
FORMS = {
    "causal": {},
    "causal-hyperbolic": {"features": "hyperbolic", "eps": 1e-2},
    "causal-relu": {"features": "relu", "eps": 1e-3},
    "whole": {"causal": False, "eps": 1e-2},
    "whole-hyperbolic": {"causal": False, "features": "hyperbolic"},
    "whole-relu": {"causal": False, "features": "relu", "feature_eps": 0.1},
    "jax": {"causal": False, "compat": "jax", "feature_eps": 1e-2, "eps": 1e-3},
}
CAUSAL = [form for form, options in FORMS.items() if options.get("causal", True)]


def inputs_of(
    tokens: int,
    *,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    width: int = 6,
    channels: int = 5,
    rows: int = 7,
    keys: int | None = None,
    sequences: int | None = None,
    state: bool = True,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    features: str = "positive",
    causal: bool = True,
    **options: object,
) -> dict[str, Tensor]:
    """Tensor arguments of `favor_attention` by name; float64 values that are exact in `dtype`."""
    source = tokens if keys is None else keys
    made = {
        "q": scale * torch.randn(batch, tokens, heads, width),
        "k": scale * torch.randn(batch, source, groups, width),
        "v": torch.randn(batch, source, groups, channels),
        "projection": torch.randn(rows, width),
    }
    if state and causal:
        sums = torch.randn(sequences or batch, heads, feature_count(rows, features), channels + 2)
        sums[..., -2] = sums[..., -2].abs() + 1
        made["initial_state"] = sums if features != "relu" else torch.cat([sums[..., :-1], 0 * sums[..., -1:]], -1)
    return {name: value.double().to(dtype).double() for name, value in made.items()}


def run(
    given: dict[str, Tensor], backend: str, dtype: torch.dtype = torch.float64, **options: object
) -> dict[str, Tensor]:
    """y, final_state and gradients of a fixed random loss, by name; half precision keeps projection and state wide."""
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        name: value.to(dtype if name in "qkv" else inner, copy=True).requires_grad_() for name, value in given.items()
    }
    y, final_state = favor_attention(**leaves, backend=backend, **options)
    seeded = torch.Generator().manual_seed(7)
    w, ws = (torch.randn(part.shape, generator=seeded, dtype=torch.float64) for part in (y, final_state))
    loss = (y * w.to(y)).sum() + (final_state * ws.to(final_state)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    gradients = {f"grad.{name}": grad for name, grad in zip(leaves, found, strict=True)}
    return {"y": y.detach(), "final_state": final_state.detach()} | gradients


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], limit: float = 1e-11) -> None:
    """Relative RMS errors within `limit`; a gradient that cancels to nearly 0 is measured against 1e-3 instead."""
    for name, exact in other.items():
        assert one[name].shape == exact.shape, name
        error = rms(one[name] - exact) / max(rms(exact), 1e-3)
        assert error <= limit, f"{name}: {error:.2e}"


def features_of(x: Tensor, projection: Tensor, features: str) -> Tensor:
    """phi(x) itself, [B,T,H,M], of ordinary inputs."""
    if features == "relu":
        return relu_features(x, projection, 1e-3)
    return log_features(x, projection, features).exp() * feature_count(projection.shape[0], features) ** -0.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_chunked_path_agrees_with_the_definition(tokens: int, form: str) -> None:
    given = inputs_of(tokens, **FORMS[form])
    assert_same(run(given, "chunked", **FORMS[form]), run(given, "reference", **FORMS[form]))


@pytest.mark.parametrize("form", ["causal", "causal-relu"])
def test_many_chunks_are_carried_exactly(form: str) -> None:
    given = inputs_of(64 * 33 + 5, batch=1, heads=1, groups=1, rows=3, **FORMS[form])
    assert_same(run(given, "chunked", **FORMS[form]), run(given, "reference", **FORMS[form]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "jax"])
def test_attention_is_the_normalised_matrix_of_products(form: str, backend: str) -> None:
    options = dict(FORMS[form])
    options.pop("feature_eps", None)
    given = inputs_of(23, groups=4, state=False, **options)
    y = run(given, backend, **options)["y"]
    kind = options.get("features", "positive")
    phi_q, phi_k = (features_of(given[part], given["projection"], kind) for part in "qk")
    weights = torch.einsum("bihm,bjhm->bhij", phi_q, phi_k)
    weights = weights.tril() if options.get("causal", True) else weights
    weights = weights / (weights.sum(-1, keepdim=True) + options.get("eps", 0.0))
    assert_same({"y": y}, {"y": torch.einsum("bhij,bjhp->bihp", weights, given["v"])})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ends", [[0, 0, 5, 69, 69, 70, 134, 151, 151], [0, 3, 3], [0, 0, 1], list(range(9))])
def test_a_packed_row_equals_separate_sequences(ends: list[int], form: str) -> None:
    options = FORMS[form]
    given = inputs_of(ends[-1], batch=1, sequences=len(ends) - 1, **options)
    packing = torch.tensor(ends, dtype=torch.int32)
    packed = run(given, "chunked", cu_seqlens=packing, **options)
    assert_same(packed, run(given, "reference", cu_seqlens=packing, **options))
    for s, (a, b) in enumerate(itertools.pairwise(ends)):
        alone = {name: value[:, a:b] if name in "qkv" else value for name, value in given.items()}
        if "initial_state" in given:
            alone["initial_state"] = given["initial_state"][s : s + 1]
        y, final = favor_attention(**alone, **options)
        assert_same({"y": packed["y"][:, a:b], "final_state": packed["final_state"][s : s + 1]},
                    {"y": y, "final_state": final})  # fmt: skip


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
        name: value.masked_fill(~mask[:, :, None, None], math.nan) if name in "qkv" else value
        for name, value in given.items()
    }
    padded = run(dirty, backend, padding_mask=mask, **options)
    assert bool((padded["y"][~mask] == 0).all())
    for name in dirty:
        assert bool(padded[f"grad.{name}"].isfinite().all()), name
        if name in "qkv":
            assert bool((padded[f"grad.{name}"][~mask] == 0).all()), name
    for row, (a, b) in enumerate(real):
        alone = {name: value[row : row + 1, a:b] if name in "qkv" else value for name, value in given.items()}
        if "initial_state" in given:
            alone["initial_state"] = given["initial_state"][row : row + 1]
        y, final = favor_attention(**alone, **options, backend="reference")
        assert_same({"y": padded["y"][row : row + 1, a:b], "final_state": padded["final_state"][row : row + 1]},
                    {"y": y, "final_state": final})  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_may_read_another_sequence_with_padded_keys(backend: str) -> None:
    for options in (FORMS["whole"], FORMS["whole-relu"], FORMS["jax"]):
        given = inputs_of(7, keys=12, **options)
        mask = torch.ones(2, 12, dtype=torch.bool)
        mask[1, 8:] = False
        result = run(given, backend, padding_mask=mask, **options)
        alone = {name: value[1:, :8] if name in "kv" else value for name, value in given.items()}
        alone["q"] = given["q"][1:]
        assert_same({"y": result["y"][1:]}, {"y": run(alone, "reference", **options)["y"]})


@pytest.mark.parametrize("form", CAUSAL)
def test_a_split_sequence_passes_its_state_on(form: str) -> None:
    given = inputs_of(100, state=False, **FORMS[form])
    whole = favor_attention(**given, **FORMS[form])
    state, parts = None, []
    for a, b in itertools.pairwise([0, 1, 2, 66, 67, 100]):
        cut = {key: value[:, a:b] if key in "qkv" else value for key, value in given.items()}
        y, state = favor_attention(**cut, initial_state=state, **FORMS[form])
        parts.append(y)
    assert_same({"y": torch.cat(parts, 1), "final_state": state}, {"y": whole[0], "final_state": whole[1]})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_holds_scaled_sums_beside_the_running_maximum(backend: str) -> None:
    given = inputs_of(40, groups=4, state=False, scale=2.0)
    _, state = favor_attention(**given, backend=backend)
    logs = log_features(given["k"], given["projection"], "positive")  # [B,T,H,M]
    top = logs.amax(1)
    assert torch.allclose(state[..., -1], top)
    features = (logs - top.unsqueeze(1)).exp()
    assert torch.allclose(state[..., -2], features.sum(1))
    assert torch.allclose(state[..., :-2], torch.einsum("bthm,bthp->bhmp", features, given["v"]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packing", [None, torch.tensor([0, 0, 0])])
@pytest.mark.parametrize("form", FORMS)
def test_an_empty_input_returns_its_state(form: str, packing: Tensor | None, backend: str) -> None:
    batch = 2 if packing is None else 1
    given = inputs_of(0, batch=batch, sequences=2, **FORMS[form])
    y, final_state = favor_attention(**given, cu_seqlens=packing, backend=backend, **FORMS[form])
    assert y.shape == (batch, 0, 4, 5)
    if "initial_state" in given:
        assert torch.equal(final_state, given["initial_state"])
    else:
        assert bool((final_state[..., :-1] == 0).all())
        assert bool((final_state[..., -1] == torch.finfo(torch.float64).min).all())


def outgrowing_keys(tokens: int, growth: float) -> dict[str, Tensor]:
    """Keys whose features grow from one to the next by about exp(growth): large norms shrink."""
    given = inputs_of(tokens, batch=1, heads=2, groups=2, width=8, rows=11, state=False)
    norms = (2 * growth * torch.arange(tokens, 0, -1).double()).sqrt() * 8**0.25
    given["k"] = torch.nn.functional.normalize(given["k"], dim=-1) * norms[None, :, None, None]
    return {name: value.float().double() for name, value in given.items()}


@pytest.mark.parametrize("growth", [3.0, 30.0, 300.0])
def test_keys_that_outgrow_all_earlier_ones_neither_overflow_nor_lose_digits(growth: float) -> None:
    given = outgrowing_keys(70, growth)
    exact, plain = run(given, "reference"), run(given, "chunked", torch.float32)
    assert_same(run(given, "chunked"), exact, 1e-9)
    for name in ("y", "final_state", "grad.v"):
        assert bool(plain[name].isfinite().all()), name
    largest = float(log_features(given["k"], given["projection"], "positive").abs().max())
    assert relative_rms(plain["y"], exact["y"]) < 16 * largest * torch.finfo(torch.float32).eps
    assert all(bool(value.isfinite().all()) for value in plain.values())


@pytest.mark.parametrize("past", [2.0, 8.0])  # of size 8, keys outgrow earlier ones by more than exp(LIMIT)
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_future_keys_change_no_bit_of_past_outputs(backend: str, scale: float, past: float) -> None:
    given = {name: value.float() for name, value in inputs_of(80, scale=past, state=False).items()}
    changed = {name: value.clone() for name, value in given.items()}
    for name in "qkv":
        changed[name][:, 41:] = scale * torch.randn_like(changed[name][:, 41:])
    ours, other = (favor_attention(**each, backend=backend)[0] for each in (given, changed))
    assert torch.equal(ours[:, :41], other[:, :41])
    assert not torch.equal(ours[:, 41:], other[:, 41:])


@pytest.mark.parametrize("features", ["positive", "hyperbolic"])
@pytest.mark.parametrize("kind", ["packed", "padded", "state"])
def test_outgrown_rows_agree_with_the_definition_packed_padded_and_continued(kind: str, features: str) -> None:
    options: dict[str, object] = {"features": features, "eps": 1e-2}
    packed = kind == "packed"
    given = inputs_of(
        150, batch=1 if packed else 2, sequences=4 if packed else None, scale=5.0, state=kind != "padded",
        features=features,
    )  # fmt: skip
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 70, 70, 73, 150])
    if kind == "padded":
        mask = torch.ones(2, 150, dtype=torch.bool)
        mask[0, :9] = mask[1, 101:] = False
        options["padding_mask"] = mask
    logs = log_features(given["k"], given["projection"], features)
    assert float((logs.cummax(1).values[:, 63] - logs[:, 0]).max()) > LIMIT
    assert_same(run(given, "chunked", **options), run(given, "reference", **options), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_the_chunked_path_keeps_the_digits_of_its_dtype(form: str, dtype: torch.dtype) -> None:
    options = FORMS[form]
    given = inputs_of(150, width=16, channels=8, rows=20, scale=0.7, dtype=dtype, **options)
    exact, plain = run(given, "reference", **options), run(given, "chunked", dtype, **options)
    for name, value in plain.items():
        verdict = judge(value, exact[name], None, dtype)
        assert verdict.ok or (dtype == torch.float32 and verdict.error < 5e-6), f"{name}: {verdict}"
    assert plain["y"].dtype == dtype
    assert plain["final_state"].dtype == torch.float32


@pytest.mark.parametrize("form", ["causal", "causal-relu", "whole-hyperbolic"])
def test_the_reference_differentiates_twice(form: str) -> None:
    options = FORMS[form]
    given = inputs_of(4, batch=1, heads=2, groups=1, width=2, channels=2, rows=2, state=False, **options)
    leaves = {name: value.requires_grad_() for name, value in given.items()}

    def call(*parts: Tensor) -> Tensor:
        return favor_attention(**dict(zip(leaves, parts)), **options, backend="reference")[0]

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize(
    ("tokens", "form", "packing"),
    [(4, "causal", "packed"), (4, "causal", "padded"), (4, "whole", "packed"), (4, "jax", "padded")],
)  # fmt: skip
def test_the_chunked_path_compiles_without_a_graph_break(tokens: int, form: str, packing: str) -> None:
    options = dict(FORMS[form])
    if packing == "packed":
        options["cu_seqlens"] = torch.tensor([0, 0, tokens // 2, tokens])
    if packing == "padded":
        options["padding_mask"] = torch.arange(tokens).expand(2, -1) >= tokens // 2
    packed = packing == "packed"
    given = inputs_of(tokens, batch=1 if packed else 2, sequences=3 if packed else None, **FORMS[form])
    leaves = [value.requires_grad_() for value in given.values()]

    def call(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return favor_attention(**dict(zip(given, parts)), **options)

    torch._dynamo.reset()
    results = []
    for fn in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        y, state = fn(*leaves)
        loss = y.square().sum() + state[..., :-1].sum()
        results.append(dict(enumerate([y, state, *torch.autograd.grad(loss, leaves)])))
    assert_same(results[1], results[0], 1e-13)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_inputs_need_not_be_contiguous(form: str) -> None:
    given = inputs_of(70, **FORMS[form])
    turned = {name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in given.items()}
    assert_same(run(turned, "chunked", **FORMS[form]), run(given, "chunked", **FORMS[form]))


@pytest.mark.parametrize("form", FORMS)
def test_autocast_does_not_reach_the_sums(form: str) -> None:
    given = {name: value.float() for name, value in inputs_of(70, **FORMS[form]).items()}
    outside = favor_attention(**given, **FORMS[form])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = favor_attention(**given, **FORMS[form])
    assert torch.equal(inside[0], outside[0])
    assert torch.equal(inside[1], outside[1])


@pytest.mark.parametrize("tokens", [1, 64, 200])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("causal", [True, False])
def test_the_cost_is_what_torch_counts(causal: bool, features: str, tokens: int) -> None:
    given = inputs_of(tokens, state=False, rows=16, features=features)
    with FlopCounterMode(display=False) as counter:
        favor_attention(**given, features=features, causal=causal)
    assert counter.get_total_flops() == flops(2, tokens, 4, 2, 6, 5, 16, features=features, causal=causal)


def test_the_choice_is_recorded_once() -> None:
    with record_dispatch() as record:
        favor_attention(**inputs_of(3, state=False))
    assert [(entry.op, entry.backend) for entry in record] == [("favor_attention", "chunked")]
    assert "float64" in record[0].reasons["triton"] or "cpu" in record[0].reasons["triton"]


def test_bad_inputs_are_refused_in_words() -> None:
    given = inputs_of(6)
    q, k, v, projection, state = given.values()
    with pytest.raises(ShapeError, match=r"k has shape \[2, 5, 2, 6\], wanted \[B=2, T=6, G, N=6\]"):
        favor_attention(q, k[:, :5], v[:, :5], projection)
    with pytest.raises(ShapeError, match="q has H=4 heads, wanted a multiple of the G=3"):
        favor_attention(q, k[:, :, :1].expand(-1, -1, 3, -1), v[:, :, :1].expand(-1, -1, 3, -1), projection)
    with pytest.raises(ShapeError, match=r"projection has shape \[7, 5\], wanted \[M, N=6\]"):
        favor_attention(q, k, v, projection[:, :5])
    with pytest.raises(ShapeError, match=r"initial_state has shape \[2, 4, 7, 7\], wanted \[S=2, H=4, M=14, 7\]"):
        favor_attention(q, k, v, projection, features="hyperbolic", initial_state=state)
    with pytest.raises(DtypeError, match=r"k is torch\.float32"):
        favor_attention(q, k.float(), v, projection)
    with pytest.raises(ConfigError, match="no random features named 'positiv'; did you mean positive"):
        favor_attention(q, k, v, projection, features="positiv")
    with pytest.raises(ConfigError, match="initial_state came with causal=False"):
        favor_attention(q, k, v, projection, initial_state=state, causal=False)
    with pytest.raises(ConfigError, match=r"feature_eps=0\.1 came with features='positive'"):
        favor_attention(q, k, v, projection, feature_eps=0.1)
    with pytest.raises(ConfigError, match="ReLU features, which have no stabiliser"):
        favor_attention(q, k, v, projection, features="relu", causal=False, compat="jax")
    with pytest.raises(ConfigError, match="compat is 'torch'"):
        favor_attention(q, k, v, projection, causal=False, compat="torch")
    with pytest.raises(ConfigError, match="eps is -1"):
        favor_attention(q, k, v, projection, eps=-1.0)
    with pytest.raises(PackingError, match="has batch 2"):
        favor_attention(q, k, v, projection, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(BackendError, match="has no backend 'fft'"):
        favor_attention(q, k, v, projection, backend="fft")

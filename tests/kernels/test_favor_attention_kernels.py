"""FAVOR+ attention by the Triton kernels against the definition, judged by the error of the plain path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.favor_attention import favor_attention
from zoo.ops.favor_attention.features import log_features

from favor_cases import check, inputs, outgrowing, padding, run
from sequence_mixer.conformance.budget import judge, relative_rms
from sequence_mixer.errors import BackendError

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ENDS = [0, 0, 5, 6, 6, 40, 41]
WIDE: dict[str, int] = {"width": 64, "channels": 64, "rows": 70}  # what the bfloat16 kernels serve


WHOLE = {"causal": False}
RELU = {"features": "relu"}
PACKED = {"cu_seqlens": torch.tensor(ENDS)}
CASES: dict[str, tuple[dict, dict]] = {
    "one-token": ({"tokens": 1, "state": True}, {}),
    "chunk-less-one": ({"tokens": 31, "batch": 1, "heads": 1, "groups": 1}, {}),
    "chunk-and-one": ({"tokens": 65, "batch": 1, "state": True, "groups": 1, "rows": 16}, {}),
    "many-features": ({"tokens": 37, "batch": 1, "heads": 1, "groups": 1, "rows": 70}, {}),
    "odd-widths": ({"tokens": 33, "batch": 1, "width": 20, "channels": 33, "state": True}, {"eps": 1e-2}),
    "hyperbolic": ({"tokens": 40, "groups": 1, "batch": 1, "rows": 10}, {"features": "hyperbolic"}),
    "relu": ({"tokens": 40, "batch": 1, "state": True}, RELU | {"eps": 0.1}),
    "padded": ({"tokens": 40, "batch": 3, "heads": 1, "groups": 1}, {"padding_mask": padding(40)}),
    "packed": ({"tokens": 41, "batch": 1, "heads": 1, "groups": 1, "state": True, "sequences": 6}, PACKED),
    "packed-relu": ({"tokens": 41, "batch": 1, "heads": 1, "groups": 1}, PACKED | RELU),
    "whole": ({"tokens": 70, "batch": 1, "groups": 1, "rows": 40}, WHOLE | {"eps": 1e-2}),
    "whole-hyperbolic": ({"tokens": 33, "batch": 1, "width": 20, "channels": 5}, WHOLE | {"features": "hyperbolic"}),
    "whole-relu": ({"tokens": 33, "batch": 1, "groups": 1}, WHOLE | RELU),
    "whole-padded": ({"tokens": 40, "batch": 3, "heads": 1, "groups": 1}, WHOLE | {"padding_mask": padding(40)}),
    "whole-packed": ({"tokens": 41, "batch": 1, "heads": 1, "groups": 1}, WHOLE | PACKED),
    "whole-cross": (
        {"tokens": 9, "keys": 40, "batch": 3, "heads": 1, "groups": 1},
        WHOLE | {"padding_mask": padding(40)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_states_and_gradients_stay_within_budget(name: str, device: str) -> None:
    sizes, options = CASES[name]
    check(inputs(device, **sizes, **options), torch.float32, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["many-features", "relu", "whole"])
def test_half_precision_stays_within_budget(name: str, dtype: torch.dtype, device: str) -> None:
    sizes, options = CASES[name]
    check(inputs(device, **sizes, **options), dtype, **options)


@pytest.fixture(params=["float32", "walk"])
def kernels(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype that leads to the kernels in float32, or in bfloat16 to the walks."""
    from zoo.ops.favor_attention.kernels import walk_launch

    if request.param == "float32":
        return torch.float32
    assert walk_launch.serves(WIDE["width"], WIDE["channels"], WIDE["rows"], torch.bfloat16)
    return torch.bfloat16


HALF = pytest.mark.parametrize("kernels", ["walk"], indirect=True)


@HALF
@pytest.mark.parametrize("name", ["chunk-and-one", "hyperbolic", "padded", "packed", "packed-relu"])
def test_the_bfloat16_kernels_of_wide_heads_stay_within_budget(name: str, kernels: torch.dtype, device: str) -> None:
    sizes, options = CASES[name]
    check(inputs(device, **sizes | WIDE, **options), kernels, **options)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_inputs_that_are_no_numbers_end(kernels: torch.dtype, bad: float, device: str) -> None:
    given = inputs(device, 40, batch=1, heads=1, groups=1, **WIDE)
    given = {n: x.to(kernels) if n in "qkv" else x for n, x in given.items()}
    clean = favor_attention(**given, backend="triton")[0]
    given["k"][0, 21] = bad
    y = favor_attention(**given, backend="triton")[0]
    assert torch.equal(y[:, :21], clean[:, :21])
    assert not bool(y[:, 21:].isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1000, 4096])
def test_long_inputs_stay_within_budget_on_a_gpu(tokens: int, dtype: torch.dtype, device: str) -> None:
    if device != "cuda":
        pytest.skip("lengths above 130 take too long in the interpreter; this needs a CUDA device")
    ends = torch.tensor([0, 3, 700, 700, tokens])
    for width in (64, 128):
        for options in ({}, {"features": "hyperbolic"}, RELU, WHOLE, WHOLE | RELU):
            sizes = {"heads": 2, "groups": 2, "width": width, "channels": width, "rows": 256}
            check(inputs(device, tokens, **sizes), dtype, **options)
            check(inputs(device, tokens, batch=1, **sizes), dtype, cu_seqlens=ends, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_stays_within_budget_on_a_gpu(dtype: torch.dtype, width: int, device: str) -> None:
    if device != "cuda":
        pytest.skip("every block size takes too long in the interpreter; this needs a CUDA device")
    for rows in (16, 200):
        for options in ({}, RELU, WHOLE):
            sizes = {"heads": 4, "groups": 2, "width": width, "channels": width, "rows": rows}
            check(inputs(device, 300, state=options is not WHOLE, **sizes, **options), dtype, **options)


def test_keys_that_outgrow_all_earlier_ones_neither_overflow_nor_lose_digits(device: str) -> None:
    given = outgrowing(device, 40)
    logs = log_features(given["k"], given["projection"], "positive")
    assert float(logs.max() - logs.min()) > 1000
    exact = run({name: value.double() for name, value in given.items()}, "reference")
    plain, ours = run(given, "chunked"), run(given, "triton")
    verdict = judge(ours["y"], exact["y"], plain["y"], torch.float32)
    assert verdict.ok, f"{verdict}"
    # the backward knows sums of weights by their logarithms, which have an absolute rounding error
    assert relative_rms(ours["v"], exact["v"]) < float(logs.abs().max()) * torch.finfo(torch.float32).eps
    assert all(bool(value.isfinite().all()) for value in ours.values())


@HALF
def test_bfloat16_keys_that_outgrow_all_earlier_ones_close_runs_and_lose_nothing(
    kernels: torch.dtype, device: str
) -> None:
    given = {n: x.to(kernels) if n in "qkv" else x for n, x in outgrowing(device, 12, **WIDE).items()}
    exact = run({name: value.double() for name, value in given.items()}, "reference")
    plain, ours = run(given, "chunked"), run(given, "triton")
    for name in ("y", "v"):
        verdict = judge(ours[name], exact[name], plain[name], torch.bfloat16)
        assert verdict.ok, f"{name}: {verdict}"
    assert all(bool(value.isfinite().all()) for value in ours.values())


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_future_tokens_change_no_bit_of_past_outputs(scale: float, kernels: torch.dtype, device: str) -> None:
    given = inputs(device, 40, batch=1, heads=1, groups=1, **WIDE)
    changed = {name: value.clone() for name, value in given.items()}
    for name in "qkv":
        changed[name][:, 21:] = scale * torch.randn_like(changed[name][:, 21:])
    changed["k"][:, 23] = 0.0  # outgrows keys of large norm
    found = [
        favor_attention(**{n: x.to(kernels) if n in "qkv" else x for n, x in each.items()}, backend="triton")[0]
        for each in (given, changed)
    ]
    assert torch.equal(found[0][:, :21], found[1][:, :21])
    assert not torch.equal(found[0][:, 21:], found[1][:, 21:])
    assert bool(found[1].isfinite().all())


def test_slices_of_a_projection_and_expanded_cotangents_are_served(device: str) -> None:
    whole, projection = torch.randn(1, 33, 3, 2, 16, device=device), torch.randn(20, 16, device=device)
    for options in ({}, WHOLE):
        found = []
        for backend in ("triton", "reference"):
            leaf = whole.clone().requires_grad_()
            y, final = favor_attention(*leaf.unbind(2), projection, backend=backend, **options)
            found.append([y, *torch.autograd.grad(y.sum() + final[..., :-1].sum(), leaf)])
        for value, exact in zip(*found, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, WHOLE], ids=["causal", "whole"])
def test_nan_in_padded_slots_and_scratch_changes_nothing(
    options: dict, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = padding(40).to(device)
    given = inputs(device, 40, batch=3, heads=1, groups=1, rows=40)
    clean = run(given, "triton", padding_mask=mask, eps=1e-2, **options)
    assert bool((clean["y"][~mask] == 0).all())
    dirty = {
        name: value.masked_fill(~mask[:, :, None, None], torch.nan) if name in "qkv" else value
        for name, value in given.items()
    }
    empty = torch.empty

    def nan_filled(*args: object, **options: object) -> Tensor:
        made = empty(*args, **options)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", nan_filled)
    for name, value in run(dirty, "triton", padding_mask=mask, eps=1e-2, **options).items():
        torch.testing.assert_close(value, clean[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["packed", "padded"])
def test_the_kernels_compile_whole(name: str, device: str) -> None:
    options = {"packed": PACKED, "padded": WHOLE | {"padding_mask": padding(41)[:1]}}[name]
    options = {key: x.to(device) if torch.is_tensor(x) else x for key, x in options.items()}
    given = inputs(device, 41, batch=1, heads=1, groups=1, rows=8)

    def call(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return favor_attention(**dict(zip(given, parts)), backend="triton", **options)

    torch._dynamo.reset()
    outcomes = []
    for fn in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = [value.clone().requires_grad_(part != "projection") for part, value in given.items()]
        y, final = fn(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        outcomes.append([y, final, *torch.autograd.grad(y.square().sum() + final[..., :-1].sum(), wanted)])
    for value, exact in zip(outcomes[1], outcomes[0], strict=True):
        torch.testing.assert_close(value, exact)


def test_the_operators_pass_opcheck(device: str) -> None:
    given = inputs(device, 5, batch=1, heads=1, groups=1, rows=4)
    start, end = torch.zeros(1, dtype=torch.int64, device=device), torch.full((1,), 5, device=device)
    leaves = [given[name].requires_grad_() for name in "qkv"]
    for causal in (True, False):
        call = (*leaves, given["projection"], None, start, end, start, end, False, False, causal, 0.0)
        torch.library.opcheck(
            torch.ops.zoo.favor_attention.default, call, test_utils=("test_schema", "test_faketensor")
        )


def test_the_flop_counter_sees_the_kernels(device: str) -> None:
    given = inputs(device, 40, batch=1, heads=1, groups=1)
    for options in ({}, WHOLE):
        with FlopCounterMode(display=False) as counter:
            run(given, "triton", **options)
        assert counter.get_total_flops() > 2 * 40 * 24 * 16 * 4


def test_an_empty_input_is_served(device: str) -> None:
    given = inputs(device, 0, state=True)
    y, final = favor_attention(**given, backend="triton")
    assert y.shape == (2, 0, 2, 16)
    assert torch.equal(final, given["initial_state"])


def test_what_the_kernels_do_not_serve_is_refused_in_words(device: str) -> None:
    given = inputs(device, 5)
    with pytest.raises(BackendError, match="no kernel for compat='jax'"):
        favor_attention(**given, causal=False, compat="jax", backend="triton")
    with pytest.raises(BackendError, match="at most 256 channels, wanted N=300, P=16"):
        favor_attention(**inputs(device, 5, width=300), backend="triton")
    with pytest.raises(BackendError, match="takes float32, bfloat16, float16"):
        favor_attention(**{name: value.double() for name, value in given.items()}, backend="triton")
    with pytest.raises(BackendError, match="no gradient for the projection"):
        favor_attention(**given | {"projection": given["projection"].requires_grad_()}, backend="triton")
    leaves = {name: value.detach().requires_grad_(name != "projection") for name, value in given.items()}
    y, _ = favor_attention(**leaves, backend="triton")
    (dq,) = torch.autograd.grad(y.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference' for double backward"):
        dq.sum().backward()

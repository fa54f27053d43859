"""Linear attention by the Triton kernels against the definition, judged by the error of the plain path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.linear_attention import FEATURE_MAPS, linear_attention
from zoo.ops.linear_attention.feature_map import features
from zoo.ops.linear_attention.mapped import mapped

from sequence_mixer.conformance.budget import judge
from sequence_mixer.errors import BackendError

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMALISED = {"feature_map": "elu_plus_one", "normalize": True}
ENDS = [0, 0, 5, 6, 6, 72, 73]


def inputs(
    device: str,
    tokens: int,
    *,
    batch: int = 2,
    heads: int = 2,
    groups: int = 1,
    width: int = 16,
    channels: int = 16,
    decay: bool = False,
    state: bool = False,
    sequences: int | None = None,
    normalize: bool = False,
    **options: object,
) -> dict[str, Tensor]:
    made = {
        "q": torch.randn(batch, tokens, heads, width),
        "k": torch.randn(batch, tokens, groups, width),
        "v": torch.randn(batch, tokens, groups, channels),
    }
    if decay:
        made["log_decay"] = -torch.rand(batch, tokens, heads)
    if state:
        made["initial_state"] = torch.randn(sequences or batch, heads, width, channels + normalize)
        made["initial_state"][..., -1].abs_()
    return {name: value.to(device) for name, value in made.items()}


def run(given: dict[str, Tensor], backend: str, **options: object) -> dict[str, Tensor]:
    """y, final state and every gradient for fixed cotangents."""
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    y, final = linear_attention(**leaves, backend=backend, **options)
    seeded = torch.Generator().manual_seed(5)
    dy, dfinal = (torch.randn(part.shape, generator=seeded).bfloat16().to(part) for part in (y, final))
    found = torch.autograd.grad((y, final), list(leaves.values()), (dy, dfinal))
    return {"y": y.detach(), "final_state": final.detach()} | dict(zip(leaves, found, strict=True))


def check(given: dict[str, Tensor], dtype: torch.dtype, skip: tuple[str, ...] = (), **options: object) -> None:
    options = {key: x.to(given["q"].device) if torch.is_tensor(x) else x for key, x in options.items()}
    given = {name: value.to(dtype) if name in "qkv" else value for name, value in given.items()}
    exact = run({name: value.double() for name, value in given.items()}, "reference", **options)
    plain = run(given, "chunked", **options)
    for name, value in run(given, "triton", **options).items():
        if name in skip:
            continue
        assert value.dtype == plain[name].dtype, name
        assert value.shape == plain[name].shape, name
        verdict = judge(value, exact[name], plain[name], dtype)
        assert verdict.ok, f"{name} {dtype}: {verdict}"


def padding(tokens: int) -> Tensor:
    mask = torch.ones(3, tokens, dtype=torch.bool)
    mask[0, : tokens // 3] = False
    mask[1, tokens - tokens // 4 :] = False
    return mask


CASES: dict[str, tuple[dict, dict]] = {
    "one-token": ({"tokens": 1, "state": True}, NORMALISED),
    "chunk-less-one": ({"tokens": 63, "batch": 1}, {"scale": 0.25}),
    "chunk": ({"tokens": 64, "batch": 1, "decay": True}, {"feature_map": "silu"}),
    "chunk-and-one": ({"tokens": 65, "batch": 1, "state": True}, NORMALISED),
    "prime": ({"tokens": 127, "batch": 1, "heads": 2, "groups": 1, "decay": True, "state": True}, NORMALISED),
    "odd-widths": ({"tokens": 33, "width": 20, "channels": 33}, NORMALISED | {"scale": 0.5}),
    "relu": (
        {"tokens": 40, "heads": 4, "groups": 4, "batch": 1},
        {"feature_map": "relu", "normalize": True, "eps": 1.0},
    ),
    "squared-relu": (
        {"tokens": 40, "heads": 4, "groups": 2, "batch": 1, "state": True},
        {"feature_map": "squared_relu"},
    ),
    "padded": ({"tokens": 40, "batch": 3, "decay": True}, NORMALISED | {"padding_mask": padding(40)}),
    "packed": (
        {"tokens": 73, "batch": 1, "state": True, "sequences": 6},
        NORMALISED | {"cu_seqlens": torch.tensor(ENDS)},
    ),
    "packed-decay": (
        {"tokens": 73, "batch": 1, "decay": True},
        {"cu_seqlens": torch.tensor(ENDS, dtype=torch.int32)},
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_outputs_states_and_gradients_stay_within_budget(name: str, dtype: torch.dtype, device: str) -> None:
    sizes, options = CASES[name]
    check(inputs(device, **sizes, **options), dtype, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1000, 4096])
def test_long_inputs_stay_within_budget_on_a_gpu(tokens: int, dtype: torch.dtype, device: str) -> None:
    if device != "cuda":
        pytest.skip("lengths above 130 take too long in the interpreter; this needs a CUDA device")
    ends = torch.tensor([0, 3, 700, 700, tokens])
    for width in (64, 128):
        for decay in (False, True):
            sizes = {"heads": 2, "groups": 2, "width": width, "channels": width, "decay": decay}
            check(inputs(device, tokens, **sizes), dtype, **NORMALISED)
            check(inputs(device, tokens, batch=1, **sizes), dtype, cu_seqlens=ends, **NORMALISED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_far_from_zero_keep_the_digits_of_their_mean(dtype: torch.dtype, device: str) -> None:
    given = inputs(device, 100, batch=1)
    given["v"] = given["v"] + 5.0
    # gradients of q and k are differences of nearly equal sums, whose bfloat16 operands have too few digits for them
    check(given, dtype, skip=("q", "k") if dtype == torch.bfloat16 else (), **NORMALISED)


def test_sums_beyond_float16_divide_to_a_finite_mean(device: str) -> None:
    given = inputs(device, 100, batch=1)
    given["q"], given["k"] = given["q"].abs() + 20.0, given["k"].abs() + 20.0
    given["v"] = given["v"] + 5.0
    check(given, torch.float16, **NORMALISED)


def test_slices_of_a_projection_and_expanded_cotangents_are_served(device: str) -> None:
    whole = torch.randn(2, 33, 3, 4, 16, device=device)
    for options in ({}, NORMALISED):
        found = []
        for backend in ("triton", "reference"):
            leaf = whole.clone().requires_grad_()
            y, final = linear_attention(*leaf.unbind(2), backend=backend, **options)
            found.append([y, final, *torch.autograd.grad(y.sum() + final.sum(), leaf)])
        for value, exact in zip(*found, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


def test_nan_in_padded_slots_and_scratch_changes_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = padding(40).to(device)
    given = inputs(device, 40, batch=3, decay=True)
    clean = run(given, "triton", padding_mask=mask, **NORMALISED)
    assert bool((clean["y"][~mask] == 0).all())
    dirty = {
        name: value.masked_fill(~mask.reshape(3, 40, *[1] * (value.dim() - 2)), torch.nan)
        for name, value in given.items()
    }
    empty = torch.empty

    def nan_filled(*args: object, **options: object) -> Tensor:
        made = empty(*args, **options)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", nan_filled)
    for name, value in run(dirty, "triton", padding_mask=mask, **NORMALISED).items():
        torch.testing.assert_close(value, clean[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["chunk", "chunk-and-one", "padded", "packed"])
def test_the_kernels_compile_whole(name: str, device: str) -> None:
    sizes, options = CASES[name]
    options = {key: x.to(device) if torch.is_tensor(x) else x for key, x in options.items()}
    given = inputs(device, **sizes, **options)

    def call(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(**dict(zip(given, parts)), backend="triton", **options)

    torch._dynamo.reset()
    outcomes = []
    for fn in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = [value.clone().requires_grad_() for value in given.values()]
        y, final = fn(*leaves)
        outcomes.append([y, final, *torch.autograd.grad(y.square().sum() + final.sum(), leaves)])
    for value, exact in zip(outcomes[1], outcomes[0], strict=True):
        torch.testing.assert_close(value, exact)


def test_the_flop_counter_sees_the_kernels(device: str) -> None:
    given = inputs(device, 70)
    with FlopCounterMode(display=False) as counter:
        linear_attention(**given, backend="triton")
    assert counter.get_total_flops() > 0


def test_an_empty_input_is_served(device: str) -> None:
    given = inputs(device, 0, state=True, normalize=True)
    y, final = linear_attention(**given, backend="triton", **NORMALISED)
    assert y.shape == (2, 0, 2, 16)
    assert torch.equal(final, given["initial_state"])


def test_what_the_kernels_do_not_serve_is_refused_in_words(device: str) -> None:
    given = inputs(device, 5)
    with pytest.raises(BackendError, match="no kernel for causal=False"):
        linear_attention(**given, causal=False, backend="triton")
    with pytest.raises(BackendError, match="one log decay per head"):
        linear_attention(**given, log_decay=-given["q"].abs(), backend="triton")
    with pytest.raises(BackendError, match="at most 256 by 256, wanted P=16, N=300"):
        linear_attention(**inputs(device, 5, width=300), backend="triton")
    with pytest.raises(BackendError, match="takes float32, bfloat16, float16"):
        linear_attention(**{name: value.double() for name, value in given.items()}, backend="triton")
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    y, _ = linear_attention(**leaves, backend="triton", **NORMALISED)
    (dq,) = torch.autograd.grad(y.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference' for double backward"):
        dq.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(FEATURE_MAPS))
def test_feature_maps_are_within_budget(device: str, name: str, dtype: torch.dtype) -> None:
    pieces = torch.randn(2, 37, 3, 5, 24).to(device, dtype)
    pieces[0, 0, 1, 0, :2] = torch.tensor([0.0, -20.0])
    x = pieces.unbind(2)[1].detach().requires_grad_()  # as a mixer splits its projection
    dphi = torch.randn(x.shape).to(x)

    def both(x: Tensor, y: Tensor) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad(y, x, dphi.to(y))]

    wide = x.detach().double().requires_grad_()
    exact, plain = both(wide, features(wide, name)), both(x, features(x, name).to(dtype))
    for value, truth, usual in zip(both(x, mapped(x, name)), exact, plain, strict=True):
        verdict = judge(value, truth, usual, dtype)
        assert verdict.ok, verdict

"""The short convolution: definition against recorded results, plain path against definition, errors in words."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.ops import record_dispatch, short_convolution

from golden import load_case
from sequence_mixer.conformance.budget import judge, relative_rms
from sequence_mixer.errors import BackendError, ConfigError, DtypeError, PackingError, ShapeError

PATHS = ["reference", "chunked"]
PACKINGS = [[0, 1, 1, 3, 13, 17, 17, 29], [0, 0, 2, 2], [0, 23], [0, 0, 0]]


def inputs(batch: int, tokens: int, channels: int, width: int, sequences: int | None = None) -> dict[str, Any]:
    torch.manual_seed(tokens * 100 + width)
    return {
        "x": torch.randn(batch, tokens, channels, dtype=torch.float64),
        "weight": torch.randn(channels, width, dtype=torch.float64),
        "bias": torch.randn(channels, dtype=torch.float64),
        "initial_state": torch.randn(sequences or batch, channels, width - 1, dtype=torch.float64),
    }


def run(given: dict[str, Tensor], backend: str, dtype: torch.dtype | None = None, **options: Any) -> list[Tensor]:
    """y, final state, and the gradients of the inputs for fixed cotangents."""
    leaves: dict[str, Any] = {name: t.to(dtype or t.dtype).detach().requires_grad_() for name, t in given.items()}
    y, final = short_convolution(**leaves, backend=backend, **options)
    torch.manual_seed(5)
    dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    dfinal = torch.randn(final.shape, dtype=torch.float64).to(y.dtype)
    return [y, final, *torch.autograd.grad((y, final), list(leaves.values()), (dy, dfinal), materialize_grads=True)]


@pytest.mark.parametrize("name", ["causal_conv1d", "causal_conv1d_plain", "causal_conv1d_state"])
@pytest.mark.parametrize("backend", PATHS)
def test_recorded_results_and_gradients_are_met(name: str, backend: str) -> None:
    case = load_case(name)
    t = case.tensors
    leaves = {key: t[f"in.{key}"].requires_grad_() for key in ("x", "weight", "bias") if f"in.{key}" in t}
    if "in.initial_states" in t:
        leaves["initial_states"] = t["in.initial_states"].requires_grad_()
    y, final = short_convolution(
        leaves["x"].transpose(1, 2),
        leaves["weight"],
        leaves.get("bias"),
        activation=case.config["activation"],
        initial_state=leaves.get("initial_states"),
        backend=backend,
    )
    assert relative_rms(y.transpose(1, 2), t["y"]) < 1e-10
    loss = (y.transpose(1, 2) * t["w"]).sum()
    if "final_states" in t:
        torch.testing.assert_close(final, t["final_states"], rtol=0, atol=0)
        loss = loss + (final * t["w_final_states"]).sum()
    loss.backward()
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        assert relative_rms(leaf.grad, t[f"grad.{key}"]) < 1e-10, key


@pytest.mark.parametrize("name", ["causal_conv1d", "causal_conv1d_plain", "causal_conv1d_state"])
@pytest.mark.parametrize("backend", PATHS)
def test_token_by_token_gives_the_recorded_steps(name: str, backend: str) -> None:
    case = load_case(name)
    t = case.tensors
    state = t.get("in.initial_states")  # where recorded, decoding starts there
    steps = []
    for token in t["in.x"].transpose(1, 2).split(1, 1):
        y, state = short_convolution(
            token,
            t["in.weight"],
            t.get("in.bias"),
            activation=case.config["activation"],
            initial_state=state,
            backend=backend,
        )
        steps.append(y)
    assert state is not None
    torch.testing.assert_close(state, t["conv_state"], rtol=0, atol=0)
    assert relative_rms(torch.cat(steps, 1).transpose(1, 2), t["y_step"]) < 1e-10


@pytest.mark.parametrize("backend", PATHS)
def test_recorded_packed_results_and_gradients_are_met(backend: str) -> None:
    case = load_case("causal_conv1d_packed")
    t = case.tensors
    lengths = torch.tensor([0, *case.config["seq_lens"][0]])
    leaves = {key: t[f"in.{key}"].requires_grad_() for key in ("x", "weight", "bias")}
    y, _ = short_convolution(
        leaves["x"].transpose(1, 2),
        leaves["weight"],
        leaves["bias"],
        activation=case.config["activation"],
        cu_seqlens=lengths.cumsum(0),
        backend=backend,
    )
    assert relative_rms(y.transpose(1, 2), t["y"]) < 1e-10
    (y.transpose(1, 2) * t["w"]).sum().backward()
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        assert relative_rms(leaf.grad, t[f"grad.{key}"]) < 1e-10, key


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 31])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_plain_path_equals_the_definition(tokens: int, width: int, activation: str | None) -> None:
    given = inputs(2, tokens, 6, width)
    exact, plain = (run(given, backend, activation=activation) for backend in PATHS)
    for a, b in zip(plain, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ends", PACKINGS)
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_packed_plain_path_equals_the_definition(ends: list[int], width: int) -> None:
    given = inputs(1, ends[-1], 6, width, sequences=len(ends) - 1)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    exact, plain = (run(given, backend, activation="swish", cu_seqlens=cu_seqlens) for backend in PATHS)
    for a, b in zip(plain, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("width", [1, 4])
def test_a_packed_row_equals_its_sequences_alone(backend: str, width: int) -> None:
    ends = PACKINGS[0]
    given = inputs(1, ends[-1], 5, width, sequences=len(ends) - 1)
    y, final = short_convolution(**given, cu_seqlens=torch.tensor(ends), backend=backend)
    for s, (start, end) in enumerate(itertools.pairwise(ends)):
        alone = given | {"x": given["x"][:, start:end], "initial_state": given["initial_state"][s : s + 1]}
        y_alone, final_alone = short_convolution(**alone, backend=backend)
        torch.testing.assert_close(y[:, start:end], y_alone)
        torch.testing.assert_close(final[s : s + 1], final_alone, rtol=0, atol=0)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 10, 11])
def test_two_parts_with_the_state_between_equal_the_whole(backend: str, cut: int) -> None:
    given = inputs(2, 11, 5, 4)
    whole, last = short_convolution(**given, activation="silu", backend=backend)
    first, state = short_convolution(**(given | {"x": given["x"][:, :cut]}), activation="silu", backend=backend)
    rest = given | {"x": given["x"][:, cut:], "initial_state": state}
    second, final = short_convolution(**rest, activation="silu", backend=backend)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(final, last, rtol=0, atol=0)


@pytest.mark.parametrize("backend", PATHS)
def test_nothing_crosses_a_boundary_even_nan(backend: str) -> None:
    given = inputs(1, 12, 4, 4, sequences=3)
    del given["initial_state"]
    given["x"][:, 4:7] = float("nan")
    y, final = short_convolution(**given, cu_seqlens=torch.tensor([0, 4, 7, 12]), backend=backend)
    assert bool(y[:, :4].isfinite().all())
    assert bool(y[:, 7:].isfinite().all())
    assert bool(final[0].isfinite().all())
    assert bool(final[2].isfinite().all())


@pytest.mark.parametrize("backend", PATHS)
def test_no_tokens_leave_the_state_as_it_was(backend: str) -> None:
    given = inputs(2, 0, 5, 4)
    y, final = short_convolution(**given, activation="silu", backend=backend)
    assert y.shape == (2, 0, 5)
    torch.testing.assert_close(final, given["initial_state"], rtol=0, atol=0)
    assert final.data_ptr() != given["initial_state"].data_ptr()


@pytest.mark.parametrize("tokens", [1, 3, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_plain_path_stays_within_a_few_roundings(tokens: int, dtype: torch.dtype, packed: bool) -> None:
    given = {name: t.to(dtype).double() for name, t in inputs(1, tokens, 16, 4).items()}
    options: dict[str, Any] = {"activation": "silu", "cu_seqlens": torch.tensor([0, tokens]) if packed else None}
    exact = run(given, "reference", **options)
    plain = run(given, "chunked", dtype, **options)
    for value, wanted in zip(plain, exact, strict=True):
        assert value.dtype == dtype
        verdict = judge(value, wanted, None, dtype)
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("backend", PATHS)
def test_parameters_and_state_may_have_another_dtype(backend: str) -> None:
    given = {name: t.float() for name, t in inputs(2, 9, 8, 4).items()}
    given["x"] = given["x"].bfloat16()
    leaves: dict[str, Any] = {name: t.requires_grad_() for name, t in given.items()}
    y, final = short_convolution(**leaves, backend=backend)
    assert y.dtype == final.dtype == torch.bfloat16
    (y.float().sum() + final.float().sum()).backward()
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype


@pytest.mark.parametrize("tokens", [1, 9])
def test_non_contiguous_inputs_and_cotangents_are_served(tokens: int) -> None:
    given = inputs(2, tokens, 12, 4)
    wide = torch.randn(2, 12, tokens, dtype=torch.float64)
    given["x"] = wide.transpose(1, 2)[:, :, 2:8]
    given["weight"] = torch.randn(4, 6, dtype=torch.float64).t()
    given["bias"] = torch.randn(12, dtype=torch.float64)[::2]
    given["initial_state"] = torch.randn(2, 3, 6, dtype=torch.float64).transpose(1, 2)
    for backend in PATHS:
        leaves: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in given.items()}
        y, _ = short_convolution(**leaves, backend=backend)
        dy = torch.ones(1, dtype=torch.float64).expand_as(y)
        got = torch.autograd.grad(y, list(leaves.values()), dy)
        dense = {name: t.detach().contiguous().requires_grad_() for name, t in given.items()}
        y_dense, _ = short_convolution(**dense, backend="reference")
        torch.testing.assert_close(y, y_dense)
        for a, b in zip(got, torch.autograd.grad(y_dense.sum(), list(dense.values())), strict=True):
            torch.testing.assert_close(a, b)


def test_the_definition_has_second_derivatives() -> None:
    leaves = [t.requires_grad_() for t in inputs(1, 4, 2, 3).values()]

    def f(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return short_convolution(x, weight, bias, activation="silu", initial_state=state, backend="reference")

    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 13])
def test_plain_path_compiles_into_one_graph(packed: bool, tokens: int) -> None:
    given = inputs(1, tokens, 6, 4, sequences=3 if packed else 1)
    cu_seqlens = torch.tensor([0, 0, tokens // 2, tokens]) if packed else None

    def f(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
        return short_convolution(
            x, weight, bias, activation="silu", initial_state=state, cu_seqlens=ends, backend="chunked"
        )

    outcomes = []
    for call in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        leaves: list[Any] = [t.clone().requires_grad_() for t in given.values()]
        y, final = call(*[*leaves, cu_seqlens])
        outcomes.append([y, final, *torch.autograd.grad(y.square().sum() + final.square().sum(), leaves)])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


def test_a_cpu_call_is_served_by_the_plain_path_and_says_why() -> None:
    given = inputs(1, 3, 4, 4)
    with record_dispatch() as record:
        short_convolution(**given)
    assert record[0].op == "short_convolution"
    assert record[0].backend == "chunked"
    assert "triton" in record[0].reasons


def test_wrong_calls_are_refused_in_words() -> None:
    given = inputs(2, 5, 4, 3)
    x, weight, bias, state = given.values()
    with pytest.raises(ShapeError, match=r"x has shape \[5, 4\], wanted \[B, T, D\]"):
        short_convolution(x[0], weight)
    with pytest.raises(ShapeError, match=r"weight has shape \[3, 3\], wanted \[D=4, W\]"):
        short_convolution(x, weight[:3])
    with pytest.raises(ShapeError, match="at least one tap"):
        short_convolution(x, weight[:, :0])
    with pytest.raises(ShapeError, match="bias has shape"):
        short_convolution(x, weight, bias[:3])
    with pytest.raises(ShapeError, match=r"initial_state has shape \[2, 4, 1\], wanted \[B=2, D=4, 2\]"):
        short_convolution(x, weight, initial_state=state[:, :, :1])
    with pytest.raises(ShapeError, match=r"initial_state has shape \[2, 4, 2\], wanted \[S=1, D=4, 2\]"):
        short_convolution(x[:1], weight, initial_state=state, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ConfigError, match="activation is 'relu', wanted None or 'silu'"):
        short_convolution(x, weight, activation="relu")
    with pytest.raises(DtypeError, match=r"x is torch.int64"):
        short_convolution(x.long(), weight)
    with pytest.raises(PackingError, match="the input has batch 2"):
        short_convolution(x, weight, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(PackingError, match="must rise from 0 to T=5"):
        short_convolution(x[:1], weight, cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(BackendError, match="short_convolution has no backend 'fast'"):
        short_convolution(x, weight, backend="fast")

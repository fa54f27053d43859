"""The dense state space scan: chunks against the token by token definition."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.ops.dispatch import record_dispatch
from zoo.ops.state_space import state_space_scan

from sequence_mixer.conformance.budget import judge
from sequence_mixer.errors import BackendError, PackingError, ShapeError

PACKINGS = [[0, 3, 3, 70, 71, 200, 200], [0, 0, 5], [0, 64, 192], [0, 130]]


def inputs(batch: int, tokens: int, states: int | None = None) -> dict[str, Tensor]:
    channels, outputs, width = 3, 2, 4
    A = torch.randn(channels, width, width).double()
    return {
        "x": torch.randn(batch, tokens, channels).double(),
        "A": 0.99 * A / torch.linalg.matrix_norm(A, 2)[:, None, None],
        "B": torch.randn(channels, width).double(),
        "C": torch.randn(channels, outputs, width).double(),
        "D": torch.randn(outputs, channels).double(),
    } | ({} if states is None else {"initial_state": torch.randn(states, channels, width).double()})


def run(given: dict[str, Tensor], backend: str, dtype: torch.dtype = torch.float64, **options: Any) -> list[Tensor]:
    """y, final state, and the gradients of every input."""
    leaves: dict[str, Any] = {name: tensor.to(dtype).requires_grad_() for name, tensor in given.items()}
    y, final = state_space_scan(**leaves, backend=backend, **options)
    source = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(part.shape, generator=source).bfloat16().to(part.dtype) for part in (y, final)]
    return [y.detach(), final.detach(), *torch.autograd.grad((y, final), list(leaves.values()), cotangents)]


@pytest.mark.parametrize("tokens", [1, 2, 7, 63, 64, 65, 193])
@pytest.mark.parametrize("continued", [True, False])
def test_chunks_are_the_definition(tokens: int, continued: bool) -> None:
    given = inputs(2, tokens, 2 if continued else None)
    for a, b in zip(run(given, "chunked"), run(given, "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ends", PACKINGS)
@pytest.mark.parametrize("continued", [True, False])
def test_packed_chunks_are_the_definition(ends: list[int], continued: bool) -> None:
    given = inputs(1, ends[-1], len(ends) - 1 if continued else None)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    exact, plain = (run(given, backend, cu_seqlens=cu_seqlens) for backend in ("reference", "chunked"))
    for a, b in zip(plain, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_packed_row_is_its_sequences_alone() -> None:
    ends = PACKINGS[0]
    given = inputs(1, ends[-1], len(ends) - 1)
    y, final = state_space_scan(**given, cu_seqlens=torch.tensor(ends))
    for s, (start, end) in enumerate(itertools.pairwise(ends)):
        alone = given | {"x": given["x"][:, start:end], "initial_state": given["initial_state"][s : s + 1]}
        y_alone, final_alone = state_space_scan(**alone)
        torch.testing.assert_close(y[:, start:end], y_alone)
        torch.testing.assert_close(final[s : s + 1], final_alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_stay_within_a_few_roundings(dtype: torch.dtype) -> None:
    given = {name: tensor.to(dtype).double() for name, tensor in inputs(2, 150, 2).items()}
    exact = state_space_scan(**given, backend="reference")
    narrow = {name: tensor.to(dtype) if name in ("x", "initial_state") else tensor for name, tensor in given.items()}
    y, final = state_space_scan(**narrow, backend="chunked")
    assert y.dtype == dtype
    assert final.dtype == torch.float32
    assert judge(y, exact[0], None, dtype).ok
    assert judge(final, exact[1], None, torch.float32).ok


def test_a_system_in_float64_keeps_slow_turns_over_many_tokens() -> None:
    angle = torch.tensor(0.3)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(1, 2, 2).double() * 0.99999
    B, C = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[[1.0, 0.0]]]).double()
    impulse = torch.zeros(1, 16384, 1)
    impulse[:, 0] = 1
    y, _ = state_space_scan(impulse, turn, B, C)
    rate = torch.view_as_complex(torch.stack([turn[0, 0, 0], turn[0, 1, 0]])).log()
    exact = (rate * torch.arange(16384)).exp().real
    assert judge(y.flatten(), exact, None, torch.float32).ok


def test_the_definition_has_second_derivatives() -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs(1, 3, 1).values()]

    def f(x: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return state_space_scan(x, A, B, C, D=D, initial_state=state, backend="reference")

    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("ends", [None, [0, 0, 5, 70]])
def test_calls_compile_whole(ends: list[int] | None) -> None:
    given = inputs(1, 70, None if ends is None else 3)
    cu_seqlens = None if ends is None else torch.tensor(ends)
    compiled = torch.compile(state_space_scan, backend="aot_eager", fullgraph=True)
    wanted = state_space_scan(**given, cu_seqlens=cu_seqlens)
    for a, b in zip(compiled(**given, cu_seqlens=cu_seqlens), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_no_tokens_leave_the_state_as_it_was() -> None:
    given = inputs(2, 0, 2)
    for backend in ("chunked", "reference"):
        y, final = state_space_scan(**given, backend=backend)
        assert y.shape == (2, 0, 2, 3)
        assert torch.equal(final, given["initial_state"])


def test_autocast_does_not_narrow_the_products() -> None:
    given = {name: tensor.float() for name, tensor in inputs(2, 70, 2).items()}
    with torch.autocast("cpu", torch.bfloat16):
        inside = state_space_scan(**given)
    for a, b in zip(inside, state_space_scan(**given), strict=True):
        assert torch.equal(a, b)


def test_wrong_calls_are_refused_in_words() -> None:
    given = inputs(2, 5, 2)
    with record_dispatch() as record:
        state_space_scan(**given)
    assert record[0].backend == "chunked"
    with pytest.raises(ShapeError, match=r"A has shape \[3, 4, 3\], wanted \[D=3, N, N\]"):
        state_space_scan(**(given | {"A": given["A"][..., :3]}))
    with pytest.raises(ShapeError, match=r"initial_state has shape \[1, 3, 4\], wanted \[S=2, D=3, N=4\]"):
        state_space_scan(**(given | {"initial_state": given["initial_state"][:1]}))
    with pytest.raises(PackingError, match="the input has batch 2"):
        state_space_scan(**given, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(BackendError, match="no backend 'fft'"):
        state_space_scan(**given, backend="fft")

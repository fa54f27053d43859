"""The gated RMS norm: definition against formulas, plain path against definition, errors in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.ops import gated_rms_norm, record_dispatch

from sequence_mixer.conformance.budget import judge
from sequence_mixer.errors import BackendError, ConfigError, DtypeError, ShapeError

PATHS = ["reference", "chunked"]
SHAPES = [(12,), (1, 12), (3, 5, 12), (2, 1, 3, 12)]


def inputs(shape: tuple[int, ...], gated: bool = True) -> list[Tensor]:
    torch.manual_seed(len(shape) + shape[-1])
    x, z = torch.randn(2, *shape, dtype=torch.float64)
    weight = 1.0 + 0.3 * torch.randn(shape[-1], dtype=torch.float64)
    return [x, z, weight] if gated else [x, weight]


def apply(leaves: list[Tensor], **options: Any) -> Tensor:
    x, *gate, weight = leaves
    return gated_rms_norm(x, gate[0] if gate else None, weight, **options)


def run(given: list[Tensor], backend: str, dtype: torch.dtype = torch.float64, **options: Any) -> list[Tensor]:
    """y and the gradients of the inputs for a fixed cotangent."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in given]
    y = apply(leaves, backend=backend, **options)
    torch.manual_seed(5)
    dy = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def unit_rms(value: Tensor) -> Tensor:
    return value / (value.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("backend", PATHS)
def test_the_gate_comes_before_or_after_the_norm(backend: str) -> None:
    x, z, weight = inputs((3, 5, 12))
    gate = z / (1.0 + torch.exp(-z))
    y = gated_rms_norm(x, z, weight, eps=1e-5, backend=backend)
    torch.testing.assert_close(y, unit_rms(x * gate) * weight)
    y = gated_rms_norm(x, z, weight, eps=1e-5, norm_before_gate=True, backend=backend)
    torch.testing.assert_close(y, unit_rms(x) * weight * gate)
    y = gated_rms_norm(x, None, weight, eps=1e-5, backend=backend)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (12,), weight, 1e-5))


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_groups_are_normalised_each_on_their_own(backend: str, norm_before_gate: bool) -> None:
    x, z, weight = inputs((3, 12))
    y = gated_rms_norm(x, z, weight, eps=1e-6, group_size=4, norm_before_gate=norm_before_gate, backend=backend)
    for own in (slice(0, 4), slice(4, 8), slice(8, 12)):
        alone = gated_rms_norm(
            x[:, own], z[:, own], weight[own], eps=1e-6, norm_before_gate=norm_before_gate, backend=backend
        )
        torch.testing.assert_close(y[:, own], alone)


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_definition_has_first_and_second_derivatives(norm_before_gate: bool, gated: bool) -> None:
    leaves = [t.requires_grad_() for t in inputs((2, 6), gated)]

    def f(*given: Tensor) -> Tensor:
        return apply(list(given), eps=1e-3, group_size=3, norm_before_gate=norm_before_gate, backend="reference")

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [None, 12, 3, 1])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_plain_path_equals_the_definition(
    shape: tuple[int, ...], group_size: int | None, norm_before_gate: bool, gated: bool
) -> None:
    options: dict[str, Any] = {"eps": 1e-5, "group_size": group_size, "norm_before_gate": norm_before_gate}
    exact, plain = (run(inputs(shape, gated), backend, **options) for backend in PATHS)
    for a, b in zip(plain, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_plain_path_stays_within_a_few_roundings(dtype: torch.dtype, norm_before_gate: bool) -> None:
    given = [t.to(dtype).double() for t in inputs((4, 7, 96))]
    options: dict[str, Any] = {"eps": 1e-5, "group_size": 48, "norm_before_gate": norm_before_gate}
    exact = run(given, "reference", **options)
    for value, wanted in zip(run(given, "chunked", dtype, **options), exact, strict=True):
        assert value.dtype == dtype
        verdict = judge(value, wanted, None, dtype)
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("backend", PATHS)
def test_half_inputs_with_large_values_do_not_overflow(backend: str) -> None:
    x = torch.full((2, 64), 3e4, dtype=torch.float16)
    y = gated_rms_norm(x, None, torch.ones(64), eps=1e-5, backend=backend)
    torch.testing.assert_close(y, torch.ones_like(x))


@pytest.mark.parametrize("backend", PATHS)
def test_the_weight_may_have_another_dtype(backend: str) -> None:
    x, z, weight = inputs((3, 12))
    weight = weight.float().requires_grad_()
    y = gated_rms_norm(x.bfloat16(), z.bfloat16(), weight, eps=1e-5, backend=backend)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_rows_of_zeros_are_served() -> None:
    _, z, weight = inputs((3, 12))
    x = torch.zeros(3, 12, dtype=torch.float64, requires_grad=True)
    y = gated_rms_norm(x, z, weight, eps=1e-5)
    assert not bool(y.any())
    y.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("backend", PATHS)
def test_no_rows_give_no_rows(backend: str) -> None:
    x = torch.zeros(2, 0, 12)
    assert gated_rms_norm(x, x, torch.ones(12), eps=1e-5, group_size=4, backend=backend).shape == (2, 0, 12)


@pytest.mark.parametrize("backend", PATHS)
def test_non_contiguous_inputs_are_served(backend: str) -> None:
    wide = torch.randn(3, 24, 5, dtype=torch.float64).transpose(1, 2)
    x, z, weight = wide[..., :12], wide[..., 12:], torch.randn(24, dtype=torch.float64)[::2]
    y = gated_rms_norm(x, z, weight, eps=1e-5, group_size=4, backend=backend)
    dense = gated_rms_norm(x.contiguous(), z.contiguous(), weight.contiguous(), eps=1e-5, group_size=4)
    torch.testing.assert_close(y, dense)


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_plain_path_compiles_into_one_graph(norm_before_gate: bool, gated: bool) -> None:
    def f(*given: Tensor) -> Tensor:
        return apply(list(given), eps=1e-5, group_size=4, norm_before_gate=norm_before_gate, backend="chunked")

    outcomes = []
    for call in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in inputs((3, 12), gated)]
        y = call(*leaves)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


def test_a_cpu_call_is_served_by_the_plain_path_and_says_why() -> None:
    x, z, weight = inputs((3, 12))
    with record_dispatch() as record:
        gated_rms_norm(x, z, weight, eps=1e-5)
    assert record[0].backend == "chunked"
    assert "triton" in record[0].reasons


def test_wrong_calls_are_refused_in_words() -> None:
    x, z, weight = inputs((3, 12))
    with pytest.raises(ShapeError, match=r"weight has shape \[5\], wanted \[D=12\]"):
        gated_rms_norm(x, z, weight[:5], eps=1e-5)
    with pytest.raises(ShapeError, match=r"z has shape \[1, 12\], wanted that of x, \[3, 12\]"):
        gated_rms_norm(x, z[:1], weight, eps=1e-5)
    for size in (5, 0, -4, 24):
        with pytest.raises(ShapeError, match=f"group_size={size} does not divide the D=12 channels"):
            gated_rms_norm(x, z, weight, eps=1e-5, group_size=size)
    with pytest.raises(ShapeError, match="at least one channel"):
        gated_rms_norm(x[:, :0], None, weight[:0], eps=1e-5)
    with pytest.raises(DtypeError, match=r"z is torch.float32, x is torch.float64"):
        gated_rms_norm(x, z.float(), weight, eps=1e-5)
    with pytest.raises(DtypeError, match=r"x is torch.int64"):
        gated_rms_norm(x.long(), None, weight, eps=1e-5)
    with pytest.raises(ConfigError, match="eps is -1"):
        gated_rms_norm(x, z, weight, eps=-1)
    with pytest.raises(BackendError, match="gated_rms_norm has no backend 'fast'"):
        gated_rms_norm(x, z, weight, eps=1e-5, backend="fast")

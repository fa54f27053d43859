"""Cauchy sums: the plain path against the definition, recorded results, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.cauchy import cauchy_kernel, chunked, flops
from zoo.ops.dispatch import record_dispatch

from golden import load_case
from sequence_mixer.conformance.budget import judge, relative_rms
from sequence_mixer.errors import BackendError, DtypeError, ShapeError

PATHS = ["reference", "chunked"]


def inputs(channels: int = 3, sums: int = 4, poles: int = 5, nodes: int = 17) -> dict[str, Tensor]:
    made = {
        "v": torch.randn(channels, sums, poles, 2),
        "w": torch.randn(channels, poles, 2) - torch.tensor([2.0, 0.0]),
        "z": torch.stack([torch.rand(nodes), 3 * torch.randn(nodes)], 1),
        "q": torch.rand(nodes, 2),
    }
    return {name: tensor.double() for name, tensor in made.items()}


def run(given: dict[str, Tensor], backend: str) -> list[Tensor]:
    """y and the gradients of everything for a fixed cotangent."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
    y = cauchy_kernel(**leaves, backend=backend)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), cotangent)]


@pytest.mark.parametrize("backend", PATHS)
def test_recorded_sums_and_gradients_come_back(backend: str) -> None:
    case = load_case("s4_cauchy")
    t = case.tensors
    v, w, z = t["in.v"].unsqueeze(1).requires_grad_(), t["in.w"].requires_grad_(), t["in.z"].requires_grad_()
    y = cauchy_kernel(v, w, z, backend=backend)
    assert relative_rms(y.squeeze(1), t["y"]) < 1e-10
    (y.squeeze(1) * t["w"]).sum().backward()
    for name, leaf in (("v", v), ("w", w), ("z", z)):
        assert leaf.grad is not None
        assert relative_rms(leaf.grad.reshape(t[f"grad.{name}"].shape), t[f"grad.{name}"]) < 1e-10, name


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 4, 5, 17), (2, 16, 3, 130)])
@pytest.mark.parametrize("factors", [True, False])
def test_the_plain_path_is_the_definition(sizes: tuple[int, int, int, int], factors: bool) -> None:
    given = inputs(*sizes)
    if not factors:
        del given["q"]
    for a, b in zip(run(given, "chunked"), run(given, "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("elements", [1, 200])
def test_channels_in_blocks_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs()
    whole = run(given, "chunked")
    monkeypatch.setattr(chunked, "ELEMENTS", elements)
    for a, b in zip(run(given, "chunked"), whole, strict=True):
        torch.testing.assert_close(a, b)
    kept: list[int] = []
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        cauchy_kernel(**leaves, backend="chunked")
    assert max(kept, default=0) <= 3 * 4 * 5 * 2  # the weights themselves, and no matrix of poles and nodes


def test_factors_move_poles_and_a_factor_of_zero_has_none() -> None:
    given = inputs()
    moved = cauchy_kernel(given["v"], given["w"], given["z"], 2 * torch.tensor([[1.0, 0.0]]).double().expand(17, -1))
    torch.testing.assert_close(moved, cauchy_kernel(given["v"], 2 * given["w"], given["z"]))
    flat = cauchy_kernel(given["v"], given["w"], given["z"], torch.zeros(17, 2).double())
    nodes = torch.view_as_complex(given["z"])
    wanted = 2 * given["v"][..., 0].sum(2, keepdim=True) / nodes  # [D,R,K]
    torch.testing.assert_close(torch.view_as_complex(flat), wanted)


def test_float32_stays_within_a_few_roundings() -> None:
    given = {name: tensor.float() for name, tensor in inputs(nodes=33).items()}
    exact = run({name: tensor.double() for name, tensor in given.items()}, "reference")
    for value, wanted, plain in zip(run(given, "chunked"), exact, run(given, "reference"), strict=True):
        assert value.dtype == torch.float32
        verdict = judge(value, wanted, plain, torch.float32)
        assert verdict.ok, str(verdict)


def test_half_precision_weights_are_summed_in_float32() -> None:
    given = {name: tensor.bfloat16() for name, tensor in inputs().items()}
    exact = cauchy_kernel(**{name: tensor.double() for name, tensor in given.items()}, backend="reference")
    y = cauchy_kernel(**given)
    assert y.dtype == torch.bfloat16
    assert judge(y, exact, None, torch.bfloat16).ok


def test_the_definition_has_second_derivatives() -> None:
    given = inputs(1, 2, 2, 3)
    leaves = [tensor.requires_grad_() for tensor in given.values()]
    assert torch.autograd.gradgradcheck(lambda *t: cauchy_kernel(*t, backend="reference"), leaves)


def test_flops_are_those_that_torch_counts() -> None:
    given = inputs()
    with FlopCounterMode(display=False) as counter:
        cauchy_kernel(**given, backend="chunked")
    assert counter.get_total_flops() == flops(3, 4, 5, 17)


@pytest.mark.parametrize("elements", [200, chunked.ELEMENTS])
def test_the_plain_path_compiles_whole(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(chunked, "ELEMENTS", elements)
    given = inputs()
    given["v"].requires_grad_()
    compiled = torch.compile(cauchy_kernel, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**given), cauchy_kernel(**given))


def test_a_cpu_call_says_why_it_is_not_the_kernel() -> None:
    with record_dispatch() as record:
        cauchy_kernel(**inputs())
    assert (record[0].op, record[0].backend) == ("cauchy_kernel", "chunked")
    assert "triton" in record[0].reasons


def test_wrong_calls_are_refused_in_words() -> None:
    given = inputs()
    with pytest.raises(ShapeError, match=r"w has shape \[3, 4, 2\], wanted \[D=3, N=5, 2\]"):
        cauchy_kernel(**(given | {"w": given["w"][:, :4]}))
    with pytest.raises(ShapeError, match=r"q has shape \[3, 2\], wanted \[K=17, 2\]"):
        cauchy_kernel(**(given | {"q": given["q"][:3]}))
    with pytest.raises(ShapeError, match="at least one sum and one pole"):
        cauchy_kernel(given["v"][:, :0], given["w"], given["z"])
    with pytest.raises(DtypeError, match="real pairs"):
        cauchy_kernel(given["v"].to(torch.complex128), given["w"], given["z"])
    with pytest.raises(BackendError, match="cauchy_kernel has no backend 'fast'"):
        cauchy_kernel(**given, backend="fast")

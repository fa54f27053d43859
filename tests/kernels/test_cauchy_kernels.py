"""The Triton kernels of the Cauchy sums against the definition: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.ops.cauchy import cauchy_kernel, flops, triton_path

from sequence_mixer.conformance.budget import judge
from sequence_mixer.errors import BackendError
from zoo_s4.config import S4Config
from zoo_s4.s4 import S4Mixer


def inputs(device: str, channels: int, sums: int, poles: int, nodes: int, factors: bool = True) -> dict[str, Any]:
    torch.manual_seed(nodes)
    made = {
        "v": torch.randn(channels, sums, poles, 2),
        "w": torch.randn(channels, poles, 2) - torch.tensor([2.0, 0.0]),
        "z": torch.stack([torch.rand(nodes), 3 * torch.randn(nodes)], 1),
    }
    if factors:
        made["q"] = torch.rand(nodes, 2)
    return {name: tensor.to(device) for name, tensor in made.items()}


def run(given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """y and the gradients of weights and poles."""
    leaves = {name: t.detach().requires_grad_(name in ("v", "w")) for name, t in given.items()}
    y = cauchy_kernel(**leaves, backend=backend)
    torch.manual_seed(5)
    dy = torch.randn(y.shape).bfloat16().to(y.device, y.dtype)
    dv, dw = torch.autograd.grad(y, [leaves["v"], leaves["w"]], dy)
    return {"y": y.detach(), "dv": dv, "dw": dw}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (2, 4, 5, 65), (2, 9, 3, 129)], ids=lambda sizes: "x".join(map(str, sizes))
)
@pytest.mark.parametrize("factors", [True, False])
def test_sums_and_gradients_meet_the_definition(device: str, sizes: Any, factors: bool, dtype: torch.dtype) -> None:
    given = {name: t.to(dtype) for name, t in inputs(device, *sizes, factors).items()}
    exact = run({name: t.double() for name, t in given.items()}, "reference")
    for name, value in run(given, "triton").items():
        assert value.dtype == dtype
        verdict = judge(value, exact[name], None, dtype)
        assert verdict.ok, f"{name}: {verdict}"


def test_nodes_on_the_imaginary_axis_have_no_pole_at_the_last_one(device: str) -> None:
    given = inputs(device, 2, 4, 4, 33)
    angle = torch.linspace(0, torch.pi / 2, 33, dtype=torch.float64, device=device)
    zero = torch.zeros_like(angle)
    cos = angle.cos()
    cos[-1] = 0.0
    given = {name: t.double() for name, t in given.items()} | {
        "z": torch.stack([zero, 2 * angle.sin()], 1),
        "q": torch.stack([cos, zero], 1),
    }
    got, exact = run(given, "triton"), run(given, "reference")
    for name, value in got.items():
        assert judge(value, exact[name], None, torch.float64).ok, name
    last = torch.view_as_complex(got["y"])[..., -1]
    torch.testing.assert_close(last, given["v"][..., 0].sum(2) / 1j)


def test_kernels_of_s4_are_those_of_the_definition(device: str) -> None:
    torch.manual_seed(0)
    mixer = S4Mixer(S4Config(d_model=3, d_state=6, rank=2, kernel_length=20)).double().to(device)
    outcomes = []
    for backend in ("triton", "reference"):
        mixer.backend = backend
        taps = mixer.kernel(37)
        gradients = torch.autograd.grad(taps.square().sum(), [mixer.C, mixer.A_imag, mixer.P, mixer.inv_dt])
        outcomes.append([taps.detach(), *gradients])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_strides_do_not_matter(device: str) -> None:
    given = inputs(device, 2, 3, 4, 21)
    strided = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in given.items()}
    for name, value in run(strided, "triton").items():
        assert torch.equal(value, run(given, "triton")[name]), name
    leaves = [t.requires_grad_() for name, t in given.items() if name in ("v", "w")]
    y = cauchy_kernel(*leaves, given["z"], given["q"], backend="triton")
    y.sum().backward()  # the cotangent has stride 0 everywhere
    wanted = torch.autograd.grad(
        cauchy_kernel(*leaves, given["z"], given["q"], backend="reference").sum(), leaves
    )  # fmt: skip
    for leaf, gradient in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-4)


def test_what_stood_in_memory_does_not_matter(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(device, 2, 3, 5, 37)
    clean, empty = run(given, "triton"), torch.empty

    def full_of_nan(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", full_of_nan)
    for name, value in run(given, "triton").items():
        assert torch.equal(value, clean[name]), name


def test_two_runs_give_the_same_bits(device: str) -> None:
    given = inputs(device, 2, 4, 6, 130)
    first, second = run(given, "triton"), run(given, "triton")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_custom_operators_keep_their_promises(device: str) -> None:
    given = inputs(device, 2, 2, 3, 9)
    v, w = given["v"].requires_grad_(), given["w"].requires_grad_()
    torch.library.opcheck(triton_path.cauchy_fwd, (v, w, given["z"], given["q"]))
    torch.library.opcheck(triton_path.cauchy_fwd, (v, w, given["z"], None))
    dy = torch.randn(2, 2, 9, 2, device=device)
    torch.library.opcheck(triton_path.cauchy_bwd, (dy, v.detach(), w.detach(), given["z"], given["q"]))


def test_the_triton_path_compiles_into_one_graph(device: str) -> None:
    given = inputs(device, 2, 2, 3, 9)
    compiled = torch.compile(cauchy_kernel, backend="aot_eager", fullgraph=True)
    outcomes = []
    for call in (cauchy_kernel, compiled):
        v, w = given["v"].clone().requires_grad_(), given["w"].clone().requires_grad_()
        y = call(v, w, given["z"], given["q"], backend="triton")
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), [v, w])])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


def test_the_flop_counter_sees_the_operators(device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    given = inputs(device, 2, 2, 3, 9)
    v, w = given["v"].requires_grad_(), given["w"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        cauchy_kernel(v, w, given["z"], given["q"], backend="triton").sum().backward()
    assert counter.get_total_flops() == 3 * flops(2, 2, 3, 9)


def test_what_the_kernels_do_not_serve_is_refused_in_words(device: str) -> None:
    given = inputs(device, 1, 65, 1, 3)
    with pytest.raises(BackendError, match="takes up to R=64 sums, v has 65"):
        cauchy_kernel(**given, backend="triton")
    given = inputs(device, 1, 2, 1, 3)
    with pytest.raises(BackendError, match="has no gradient for the nodes z and q"):
        cauchy_kernel(given["v"], given["w"], given["z"].requires_grad_(), backend="triton")
    with pytest.raises(BackendError, match="the input is bfloat16"):
        cauchy_kernel(given["v"].bfloat16(), given["w"], given["z"].detach(), backend="triton")
    v = given["v"].requires_grad_()
    (dv,) = torch.autograd.grad(
        cauchy_kernel(v, given["w"].requires_grad_(), given["z"].detach(), backend="triton").square().sum(), v,
        create_graph=True,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="backend='reference' for double backward"):
        dv.sum().backward()

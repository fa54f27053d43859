"""The long convolution: definition against recorded results, plain paths against definition, causality, errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from zoo.ops import long_convolution, record_dispatch
from zoo.ops.long_convolution.fft import fft_length

from golden import load_case
from sequence_mixer.conformance.budget import judge, relative_rms
from sequence_mixer.errors import BackendError, ConfigError, DtypeError, PackingError, ShapeError

PATHS = ["reference", "fft", "chunked"]
PACKINGS = [[0, 1, 1, 3, 13, 17, 17, 150], [0, 0, 2, 2], [0, 129], [0, 0, 0]]
TAPS = [(1, 0, 0), (3, 1, 1), (70, 0, 0), (70, 4, 0), (200, 150, 1)]  # of the kernel, ahead, reverse_lag


def inputs(batch: int, tokens: int, channels: int = 3, taps: int = 5, ahead: int = 0) -> dict[str, Any]:
    torch.manual_seed(tokens * 100 + taps)
    made = {
        "x": torch.randn(batch, tokens, channels),
        "kernel": torch.randn(channels, taps),
        "D": torch.randn(channels),
        "pre_gate": torch.randn(batch, tokens, channels),
        "post_gate": torch.randn(batch, tokens, channels),
    }
    if ahead:
        made["reverse_kernel"] = torch.randn(channels, ahead)
    return {name: tensor.double() for name, tensor in made.items()}


def run(given: dict[str, Tensor], backend: str, **options: Any) -> list[Tensor]:
    """y and the gradients of the inputs for a fixed cotangent."""
    leaves: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in given.items()}
    y = long_convolution(**leaves, backend=backend, **options)
    torch.manual_seed(5)
    dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, list(leaves.values()), dy, materialize_grads=True)]


@pytest.mark.parametrize("name", ["fftconv", "fftconv_gelu_rev"])
@pytest.mark.parametrize("backend", PATHS)
def test_recorded_convolutions_and_gradients_are_met(name: str, backend: str) -> None:
    case = load_case(name)
    t = case.tensors
    leaves = {key: t[f"in.{key}"].requires_grad_() for key in ("u", "k", "D", "k_rev") if f"in.{key}" in t}
    x = leaves["u"].transpose(1, 2)
    y = long_convolution(x, leaves["k"], D=leaves["D"], reverse_kernel=leaves.get("k_rev"), backend=backend)
    y = F.gelu(y) if case.config["gelu"] else y
    assert relative_rms(y.transpose(1, 2), t["y"]) < 1e-10
    (y.transpose(1, 2) * t["w"]).sum().backward()
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        assert relative_rms(leaf.grad, t[f"grad.{key}"]) < 1e-10, key


@pytest.mark.parametrize("backend", PATHS)
def test_recorded_gated_convolution_of_h3_is_met(backend: str) -> None:
    t = load_case("h3_op").tensors
    leaves = {key: t[f"in.{key}"].requires_grad_() for key in ("k", "v", "q", "ssm_kernel", "D")}
    q, k, v = (leaves[key].transpose(1, 2) for key in "qkv")
    y = long_convolution(v, leaves["ssm_kernel"], D=leaves["D"], pre_gate=k, post_gate=q, backend=backend)
    assert relative_rms(y.transpose(1, 2), t["y"]) < 1e-10
    (y.transpose(1, 2) * t["w"]).sum().backward()
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        assert relative_rms(leaf.grad, t[f"grad.{key}"]) < 1e-10, key


@pytest.mark.parametrize("name", ["s4d_bidirectional", "s4_dplr_bidirectional"])
@pytest.mark.parametrize("backend", PATHS)
def test_recorded_bidirectional_layers_are_met_with_a_lag_of_one(name: str, backend: str) -> None:
    case = load_case(name)
    t, p = case.tensors, case.parameters()
    ahead, skip = t["K"][1], p["layer.D"][0]
    y = long_convolution(t["x"], t["K"][0], D=skip, reverse_kernel=ahead, reverse_lag=1, backend=backend)
    out = F.glu(F.gelu(y) @ p["output_linear.0.weight"].t() + p["output_linear.0.bias"], -1)
    assert relative_rms(out, t["y"]) < 1e-10


@pytest.mark.parametrize("tokens", [1, 2, 5, 63, 64, 65, 131])
@pytest.mark.parametrize(("taps", "ahead", "lag"), TAPS)
@pytest.mark.parametrize("backend", ["fft", "chunked"])
def test_plain_paths_equal_the_definition(tokens: int, taps: int, ahead: int, lag: int, backend: str) -> None:
    given = inputs(2, tokens, taps=taps, ahead=ahead)
    exact, plain = (run(given, path, reverse_lag=lag) for path in ("reference", backend))
    for a, b in zip(plain, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ends", PACKINGS)
@pytest.mark.parametrize(("taps", "ahead", "lag"), TAPS)
@pytest.mark.parametrize("backend", ["fft", "chunked"])
def test_packed_plain_paths_equal_the_definition(
    ends: list[int], taps: int, ahead: int, lag: int, backend: str
) -> None:
    given = inputs(1, ends[-1], taps=taps, ahead=ahead)
    options = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32), "reverse_lag": lag}
    exact, plain = (run(given, path, **options) for path in ("reference", backend))
    for a, b in zip(plain, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", PATHS)
def test_a_packed_row_equals_its_sequences_alone(backend: str) -> None:
    ends = PACKINGS[0]
    given = inputs(1, ends[-1], taps=40, ahead=9)
    y = long_convolution(**given, cu_seqlens=torch.tensor(ends), backend=backend)
    rows = ("x", "pre_gate", "post_gate")
    for start, end in itertools.pairwise(ends):
        alone = given | {name: given[name][:, start:end] for name in rows}
        torch.testing.assert_close(y[:, start:end], long_convolution(**alone, backend=backend))


@pytest.mark.parametrize("backend", PATHS)
def test_nothing_crosses_a_boundary_even_nan(backend: str) -> None:
    given = inputs(1, 140, taps=90, ahead=90)
    given["x"][:, 4:70] = float("nan")
    given["x"].requires_grad_()
    y = long_convolution(**given, cu_seqlens=torch.tensor([0, 4, 70, 140]), backend=backend)
    dx = torch.autograd.grad(y, given["x"], torch.ones_like(y))[0]
    for value in (y, dx):
        assert bool(value[:, :4].isfinite().all())
        assert bool(value[:, 70:].isfinite().all())


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_later_tokens_leave_earlier_outputs_of_tiles_exactly_alone(backend: str) -> None:
    given = inputs(1, 150, taps=150)
    changed = given | {"x": given["x"].clone()}
    changed["x"][:, 77:] *= 1e6
    before, after = (long_convolution(**call, backend=backend)[:, :77] for call in (given, changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_transforms_are_causal_up_to_their_rounding(scale: float) -> None:
    torch.manual_seed(0)
    tokens = 2048
    x, kernel = torch.randn(1, tokens, 1), torch.randn(1, tokens)
    changed = x.clone()
    changed[:, tokens // 2 :] = scale * torch.randn(1, tokens // 2, 1)
    before, after = (long_convolution(u, kernel, backend="fft")[:, : tokens // 2] for u in (x, changed))
    size = float(kernel.norm() * changed.norm()) / math.sqrt(2 * tokens)
    assert float((before - after).abs().max()) <= 4 * 2.0**-24 * math.log2(2 * tokens) * size


def test_the_end_of_a_kernel_does_not_wrap_around() -> None:
    kernel = torch.zeros(1, 9, dtype=torch.float64)
    kernel[0, 8] = 1.0
    x = torch.randn(1, 9, 1, dtype=torch.float64)
    y = long_convolution(x, kernel, reverse_kernel=kernel, backend="fft")
    wanted = torch.zeros_like(x)
    wanted[0, 8], wanted[0, 0] = x[0, 0], x[0, 8]
    torch.testing.assert_close(y, wanted)


def test_transforms_have_even_lengths_that_suffice() -> None:
    for least in range(1, 2000):
        length = fft_length(least)
        assert length >= least
        assert length % 2 == 0
        assert length <= max(2, 1.6 * least)


@pytest.mark.parametrize("backend", ["fft", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_paths_stay_within_a_few_roundings(backend: str, dtype: torch.dtype) -> None:
    given = {name: t.to(dtype).double() for name, t in inputs(2, 150, taps=150, ahead=20).items()}
    exact = run(given, "reference")
    plain = run({name: t.to(dtype) for name, t in given.items()}, backend)
    for value, wanted in zip(plain, exact, strict=True):
        assert value.dtype == dtype
        verdict = judge(value, wanted, None, dtype)
        assert verdict.ok, str(verdict)


def test_kernels_may_be_float32_beside_half_inputs() -> None:
    given = inputs(2, 9, ahead=3)
    leaves: dict[str, Any] = {
        name: (t.bfloat16() if t.dim() == 3 else t.float()).requires_grad_() for name, t in given.items()
    }
    y = long_convolution(**leaves)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype


def test_the_definition_has_second_derivatives() -> None:
    leaves = {name: t.requires_grad_() for name, t in inputs(1, 4, 2, 3, ahead=2).items()}

    def f(*values: Tensor) -> Tensor:
        arguments: dict[str, Any] = dict(zip(leaves, values, strict=True))
        return long_convolution(**arguments, backend="reference")

    assert torch.autograd.gradgradcheck(f, list(leaves.values()))


@pytest.mark.parametrize(("backend", "packed"), [("fft", False), ("fft", True), ("chunked", True)])
def test_plain_paths_compile_into_one_graph(backend: str, packed: bool) -> None:
    given = inputs(1, 70, taps=70, ahead=3)
    ends = torch.tensor([0, 0, 30, 70]) if packed else None

    def f(arguments: dict[str, Tensor], ends: Tensor | None) -> Tensor:
        calls: dict[str, Any] = arguments
        return long_convolution(**calls, cu_seqlens=ends, backend=backend)

    outcomes = []
    for call in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        leaves: dict[str, Any] = {name: t.clone().requires_grad_() for name, t in given.items()}
        y = call(leaves, ends)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", PATHS)
def test_no_tokens_give_no_outputs(backend: str) -> None:
    assert long_convolution(**inputs(2, 0), backend=backend).shape == (2, 0, 3)


def test_a_cpu_call_is_served_by_transforms_and_says_why() -> None:
    with record_dispatch() as record:
        long_convolution(**inputs(1, 3))
    assert record[0].op == "long_convolution"
    assert record[0].backend == "fft"
    assert "triton" in record[0].reasons


def test_wrong_calls_are_refused_in_words() -> None:
    x, kernel = torch.randn(2, 5, 3), torch.randn(3, 4)
    with pytest.raises(ShapeError, match=r"x has shape \[5, 3\], wanted \[B, T, D\]"):
        long_convolution(x[0], kernel)
    with pytest.raises(ShapeError, match=r"kernel has shape \[2, 4\], wanted \[D=3, K\]"):
        long_convolution(x, kernel[:2])
    with pytest.raises(ShapeError, match="at least one tap"):
        long_convolution(x, kernel[:, :0])
    with pytest.raises(ShapeError, match=r"post_gate has shape \[2, 4, 3\], wanted \[B=2, T=5, D=3\]"):
        long_convolution(x, kernel, post_gate=x[:, :4])
    with pytest.raises(DtypeError, match=r"pre_gate is torch\.float64 and x is torch\.float32"):
        long_convolution(x, kernel, pre_gate=x.double())
    with pytest.raises(ConfigError, match="reverse_lag is -1"):
        long_convolution(x, kernel, reverse_lag=-1)
    with pytest.raises(PackingError, match="the input has batch 2"):
        long_convolution(x, kernel, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(BackendError, match="long_convolution has no backend 'fast'"):
        long_convolution(x, kernel, backend="fast")

"""The Triton kernels of the gated RMS norm against the definition: values and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.ops import gated_rms_norm
from zoo.ops.norm import MAX_KERNEL_GROUP, triton_path

from sequence_mixer.conformance.budget import judge
from sequence_mixer.errors import BackendError


def inputs(device: str, shape: tuple[int, ...], gated: bool = True) -> list[Tensor]:
    torch.manual_seed(len(shape) + shape[-1])
    x, z = torch.randn(2, *shape).to(device)
    weight = (1.0 + 0.3 * torch.randn(shape[-1])).to(device)
    return [x, z, weight] if gated else [x, weight]


def apply(leaves: list[Tensor], **options: Any) -> Tensor:
    x, *gate, weight = leaves
    return gated_rms_norm(x, gate[0] if gate else None, weight, **options)


def run(given: list[Tensor], backend: str, **options: Any) -> list[Tensor]:
    """y and the gradients of the inputs for a fixed cotangent."""
    leaves = [t.detach().requires_grad_() for t in given]
    y = apply(leaves, backend=backend, **options)
    torch.manual_seed(5)
    dy = torch.randn(y.shape).to(torch.bfloat16).to(y.device, y.dtype)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def check(given: list[Tensor], **options: Any) -> None:
    """Triton beside the definition in float64 and the plain path at the dtype of the inputs."""
    exact = run([t.double() for t in given], "reference", **options)
    plain = run(given, "chunked", **options)
    for number, value in enumerate(run(given, "triton", **options)):
        assert value.dtype == plain[number].dtype
        assert value.shape == plain[number].shape
        verdict = judge(value, exact[number], plain[number], value.dtype)
        assert verdict.ok, f"{('y', 'dx', 'dz', 'dweight')[number]}: {verdict}"


@pytest.mark.parametrize("shape", [(1,), (7,), (48,), (1, 64), (3, 5, 100), (2, 1, 3, 12)])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_every_shape_meets_the_definition(
    device: str, shape: tuple[int, ...], norm_before_gate: bool, gated: bool
) -> None:
    # the gradient of one channel alone is eps / (x^2 + eps) of its terms: a small eps leaves only rounding
    check(inputs(device, shape, gated), eps=1e-5 if shape != (1,) else 1.0, norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("group_size", [1, 4, 24, 48, 96])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_every_group_size_meets_the_definition(device: str, group_size: int, norm_before_gate: bool) -> None:
    check(inputs(device, (5, 96)), eps=1e-5, group_size=group_size, norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("float32_weight", [False, True])
def test_half_precision_stays_within_its_budget(
    device: str, dtype: torch.dtype, norm_before_gate: bool, float32_weight: bool
) -> None:
    x, z, weight = (t.to(dtype) for t in inputs(device, (33, 160)))
    if float32_weight:
        weight = weight.float()
    given = [x, z, weight]
    exact = run([t.double() for t in given], "reference", eps=1e-5, group_size=80, norm_before_gate=norm_before_gate)
    plain = run(given, "chunked", eps=1e-5, group_size=80, norm_before_gate=norm_before_gate)
    got = run(given, "triton", eps=1e-5, group_size=80, norm_before_gate=norm_before_gate)
    for value, wanted, beside in zip(got, exact, plain, strict=True):
        assert value.dtype == beside.dtype
        verdict = judge(value, wanted, beside, value.dtype)
        assert verdict.ok, str(verdict)


def test_a_wide_group_is_served(device: str) -> None:
    check(inputs(device, (3, 5000)), eps=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9, 31])
def test_every_number_of_rows_is_served(device: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.ops.norm.kernels.backward.PROGRAMS", 4)
    check(inputs(device, (rows, 24)), eps=1e-5, group_size=8)


def test_non_contiguous_inputs_and_cotangents_are_served(device: str) -> None:
    wide = torch.randn(3, 5, 96, device=device)
    check([wide[..., 8:56], wide[..., 48:], torch.randn(96, device=device)[::2]], eps=1e-5, group_size=16)
    crossed = torch.randn(3, 24, 5, device=device).transpose(1, 2)
    check([crossed, crossed.flip(1), torch.randn(24, device=device)], eps=1e-5)
    leaves = [t.requires_grad_() for t in inputs(device, (3, 24))]
    got = torch.autograd.grad(apply(leaves, eps=1e-5, backend="triton").sum(), leaves)  # stride 0 everywhere
    for a, b in zip(got, torch.autograd.grad(apply(leaves, eps=1e-5, backend="reference").sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_what_stood_in_memory_does_not_matter(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(device, (9, 40))
    clean = run(given, "triton", eps=1e-5, group_size=20)
    empty = torch.empty

    def full_of_nan(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", full_of_nan)
    for a, b in zip(clean, run(given, "triton", eps=1e-5, group_size=20), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_custom_operators_keep_their_promises(device: str, norm_before_gate: bool, gated: bool) -> None:
    x, *gate, weight = (t.requires_grad_() for t in inputs(device, (3, 2, 12), gated))
    arguments = (x, gate[0] if gate else None, weight, 1e-5, 4, norm_before_gate)
    torch.library.opcheck(triton_path.gated_rms_norm_fwd, arguments)
    detached: list[Any] = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    torch.library.opcheck(triton_path.gated_rms_norm_bwd, (torch.randn_like(detached[0]), *detached))


@pytest.mark.parametrize("gated", [False, True])
def test_the_triton_path_compiles_into_one_graph(device: str, gated: bool) -> None:
    def f(*given: Tensor) -> Tensor:
        return apply(list(given), eps=1e-5, group_size=4, backend="triton")

    outcomes = []
    for call in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in inputs(device, (3, 12), gated)]
        y = call(*leaves)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


def test_what_the_kernels_do_not_serve_is_refused_in_words(device: str) -> None:
    wide = torch.randn(1, 2 * MAX_KERNEL_GROUP, device=device)
    with pytest.raises(BackendError, match=f"takes groups of up to {MAX_KERNEL_GROUP} channels"):
        gated_rms_norm(wide, None, wide[0], eps=1e-5, backend="triton")
    with pytest.raises(BackendError, match="x is empty"):
        gated_rms_norm(wide[:0, :8], None, wide[0, :8], eps=1e-5, backend="triton")
    x, weight = (t.requires_grad_() for t in inputs(device, (3, 12), gated=False))
    y = gated_rms_norm(x, None, weight, eps=1e-5, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference' for double backward"):
        dx.sum().backward()

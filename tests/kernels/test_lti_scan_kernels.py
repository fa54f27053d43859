"""The Triton kernels of the diagonal scan against the definition: values, states and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.ops import lti_scan
from zoo.ops.lti import flops, triton_path, vandermonde

from sequence_mixer.conformance.budget import judge
from sequence_mixer.errors import BackendError

WIDE_ENOUGH = 16  # channels that the kernels for tokens as they come take
PACKINGS = [[0, 1, 1, 3, 13, 17, 17, 130], [0, 0, 2, 2], [0, 0, 97]]


def inputs(
    device: str,
    batch: int,
    tokens: int,
    channels: int = 2,
    modes: int = 4,
    *,
    sequences: int | None = None,
    ahead: bool = False,
) -> dict[str, Any]:
    torch.manual_seed(tokens * 100 + modes)
    shape = (channels, modes)
    made = {
        "x": torch.randn(batch, tokens, channels),
        "log_a": torch.stack([-0.3 * torch.rand(shape), 2.0 * torch.randn(shape)], -1),
        "c": torch.randn(*shape, 2),
        "D": torch.randn(channels),
        "initial_state": torch.randn(sequences or batch, *shape, 2),
    }
    if ahead:
        made["c_reverse"] = torch.randn(*shape, 2)
    return {name: tensor.to(device) for name, tensor in made.items()}


def run(given: dict[str, Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """y, final state, and the gradients of the inputs for fixed cotangents."""
    leaves: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in given.items()}
    y, final = lti_scan(**leaves, backend=backend, **options)
    torch.manual_seed(5)
    dy, dfinal = (torch.randn(t.shape).bfloat16().to(t.device, t.dtype) for t in (y, final))
    gradients = torch.autograd.grad((y, final), list(leaves.values()), (dy, dfinal), materialize_grads=True)
    return {"y": y, "final": final} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def check(given: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> None:
    """Triton at `dtype` beside the definition in float64 and the plain path at `dtype`."""
    given = given | {"x": given["x"].to(dtype)}
    exact = run({name: t.double() for name, t in given.items()}, "reference", **options)
    plain = run(given, "chunked", **options)
    for name, value in run(given, "triton", **options).items():
        assert value.dtype == plain[name].dtype, name
        verdict = judge(value, exact[name], plain[name], dtype)
        assert verdict.ok, f"{name}: {verdict}"


@pytest.mark.parametrize("tokens", [1, 2, 32, 33, 130])
def test_every_length_meets_the_definition(device: str, tokens: int) -> None:
    check(inputs(device, 2, tokens), torch.float32)


@pytest.mark.parametrize("reverse_lag", [0, 1])
@pytest.mark.parametrize("tokens", [1, 70])
def test_the_kernel_ahead_meets_the_definition(device: str, reverse_lag: int, tokens: int) -> None:
    check(inputs(device, 2, tokens, ahead=True), torch.float32, reverse_lag=reverse_lag)


@pytest.mark.parametrize("modes", [1, 16, 33])
def test_every_number_of_modes_meets_the_definition(device: str, modes: int) -> None:
    check(inputs(device, 2, 70, 2, modes), torch.float32)


def test_many_rows_fill_several_programs(device: str) -> None:
    check(inputs(device, 19, 70, 2), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_budget(device: str, dtype: torch.dtype) -> None:
    check(inputs(device, 2, 130, ahead=True), dtype)


@pytest.mark.parametrize(("batch", "tokens", "modes", "programs"), [(3, 70, 4, 256), (17, 5, 17, 2)])
def test_tokens_as_they_come_stay_within_their_budget(
    device: str, batch: int, tokens: int, modes: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.ops.lti.kernels import wide_launch

    monkeypatch.setattr(wide_launch, "PROGRAMS", programs)  # 2: a program for 17 rows, two blocks of them
    assert wide_launch.wide_serves(torch.bfloat16, WIDE_ENOUGH, modes)
    check(inputs(device, batch, tokens, WIDE_ENOUGH, modes, ahead=True), torch.bfloat16, reverse_lag=tokens % 2)


def test_packed_tokens_as_they_come_stay_within_their_budget(device: str) -> None:
    ends = [0, 1, 1, 30, 97]
    given = inputs(device, 1, ends[-1], WIDE_ENOUGH, sequences=len(ends) - 1)
    check(given, torch.bfloat16, cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device))


def test_tokens_as_they_come_may_be_a_slice(device: str) -> None:
    given = inputs(device, 2, 9, WIDE_ENOUGH)
    found = []
    for start in (0, 1):  # the second begins at an odd address
        whole = torch.zeros(2, 9, 2 * WIDE_ENOUGH, dtype=torch.bfloat16, device=device)
        given["x"] = whole[..., start : start + WIDE_ENOUGH].copy_(given["x"])
        found.append(run(given, "triton"))
    found.append(run(given | {"x": given["x"].transpose(1, 2).contiguous().transpose(1, 2)}, "triton"))
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found), name


@pytest.mark.parametrize(("channels", "reverse_lag"), [(2, 0), (2, 1), (16, 1)])
def test_two_directions_are_rounded_once(device: str, channels: int, reverse_lag: int) -> None:
    """3 a token behind minus 3 a token ahead: either sum exceeds 256, where bfloat16 skips odd numbers."""
    log_a, c = torch.zeros(channels, 1, 2, device=device), torch.tensor([0.5, 0.0], device=device)
    c = c.expand(channels, 1, 2)
    x = torch.full((1, 130, channels), 3.0, dtype=torch.bfloat16, device=device).requires_grad_()
    y, _ = lti_scan(x, log_a, c, c_reverse=-c, reverse_lag=reverse_lag, backend="triton")
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    behind = 3.0 * torch.arange(1, 131, device=device)
    ahead = behind.flip(0) - 3.0 * reverse_lag
    for value, exact in ((y, behind - ahead), (dx, behind.flip(0) - behind + 3.0 * reverse_lag)):
        held = exact.abs() <= 256  # the interpreter cuts off what bfloat16 does not hold
        assert held.sum() > 80
        assert torch.equal(value[0, held].float(), exact[held, None].expand(-1, channels))


def test_the_flop_counter_sees_both_directions(device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    given: dict[str, Any] = inputs(device, 2, 70, ahead=True)
    with FlopCounterMode(display=False) as counter:
        lti_scan(**given, backend="triton")
    assert counter.get_total_flops() == 2 * flops(2, 70, 2, 4)


@pytest.mark.parametrize("ends", PACKINGS)
@pytest.mark.parametrize("ahead", [False, True])
def test_packed_sequences_meet_the_definition(device: str, ends: list[int], ahead: bool) -> None:
    given = inputs(device, 1, ends[-1], sequences=len(ends) - 1, ahead=ahead)
    check(given, torch.float32, cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device), reverse_lag=1)


@pytest.mark.parametrize("packed", [False, True])
def test_skip_and_initial_state_may_be_left_out(device: str, packed: bool) -> None:
    given = inputs(device, 1, 70, sequences=3 if packed else 1, ahead=True)
    ends = torch.tensor([0, 2, 2, 70], device=device) if packed else None
    left = {name: given[name] for name in ("x", "log_a", "c", "c_reverse")}
    check(left, torch.float32, cu_seqlens=ends)


def test_slow_modes_keep_their_phase_over_many_rows(device: str) -> None:
    given = inputs(device, 1, 2000, 1, 2)
    given["log_a"] = torch.tensor([[[-1e-5, 0.3], [-1e-4, 3.0]]], device=device)
    got = lti_scan(**given, backend="triton")
    exact = lti_scan(**{name: t.double() for name, t in given.items()}, backend="chunked")
    plain = lti_scan(**given, backend="chunked")
    for value, wanted, beside in zip(got, exact, plain, strict=True):
        verdict = judge(value, wanted, beside, torch.float32)
        assert verdict.ok, str(verdict)


def test_float64_modes_beside_half_tokens_are_served(device: str) -> None:
    given = inputs(device, 1, 70)
    check(given | {name: given[name].double() for name in ("log_a", "c", "D")}, torch.bfloat16)


def test_non_contiguous_inputs_and_cotangents_are_served(device: str) -> None:
    given = inputs(device, 2, 40)
    given["x"] = torch.randn(2, 2, 40, device=device).transpose(1, 2)
    given["log_a"] = given["log_a"].transpose(0, 1).contiguous().transpose(0, 1)
    given["c"] = torch.randn(4, 2, 2, device=device).transpose(0, 1)
    given["initial_state"] = torch.randn(2, 4, 2, 2, device=device).transpose(1, 2)
    check(given, torch.float32)
    gradients = []
    for backend in ("triton", "chunked"):
        leaves: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in given.items()}
        y, _ = lti_scan(**leaves, backend=backend)
        gradients.append(torch.autograd.grad(y.sum(), list(leaves.values())))  # the cotangent has stride 0 everywhere
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("packed", "channels"), [(False, 2), (True, 2), (True, 16)])
def test_what_stood_in_memory_does_not_matter(
    device: str, packed: bool, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(device, 1, 70, channels, sequences=3 if packed else 1, ahead=channels == WIDE_ENOUGH)
    if channels == WIDE_ENOUGH:
        given["x"] = given["x"].bfloat16()
    ends = torch.tensor([0, 2, 2, 70], device=device) if packed else None
    clean = run(given, "triton", cu_seqlens=ends)
    empty = torch.empty

    def full_of_nan(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", full_of_nan)
    dirty = run(given, "triton", cu_seqlens=ends)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


@pytest.mark.parametrize(("channels", "dtype"), [(2, torch.float32), (16, torch.bfloat16)])
def test_nothing_crosses_a_boundary_even_nan(device: str, channels: int, dtype: torch.dtype) -> None:
    given = inputs(device, 1, 70, channels, sequences=3, ahead=True)
    given["x"] = given["x"].to(dtype)
    given["x"][:, 4:37] = float("nan")
    given["x"].requires_grad_()
    y, final = lti_scan(**given, cu_seqlens=torch.tensor([0, 4, 37, 70], device=device), backend="triton")
    dx = torch.autograd.grad(y, given["x"], torch.ones_like(y))[0]
    for value in (y, dx):
        assert bool(value[:, :4].isfinite().all())
        assert bool(value[:, 37:].isfinite().all())
    assert bool(final[[0, 2]].isfinite().all())


@pytest.mark.parametrize(("channels", "dtype"), [(2, torch.float32), (16, torch.bfloat16)])
def test_later_tokens_leave_earlier_outputs_exactly_alone(device: str, channels: int, dtype: torch.dtype) -> None:
    given = inputs(device, 1, 130, channels)
    given["x"] = given["x"].to(dtype)
    changed = given | {"x": given["x"].clone()}
    changed["x"][:, 77:] *= 1e6
    before, after = (lti_scan(**call, backend="triton")[0][:, :77] for call in (given, changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize("full", [False, True])
def test_the_custom_operators_keep_their_promises(device: str, full: bool) -> None:
    given = inputs(device, 1, 9, 2, 2, sequences=2, ahead=True)
    leaves: list[Any] = [
        given[name].requires_grad_() for name in ("x", "log_a", "c", "D", "c_reverse", "initial_state")
    ]
    ends = torch.tensor([0, 2, 9], device=device)
    if not full:
        leaves[3:], ends = [None, None, None], None
    torch.library.opcheck(triton_path.lti_scan_forward, (*leaves, ends, 1))
    outputs = triton_path.lti_scan_forward(*leaves, ends, 1)
    cotangents = [torch.randn_like(t) for t in outputs]
    detached = [None if t is None else t.detach() for t in leaves]
    torch.library.opcheck(triton_path.lti_scan_backward, (*cotangents, *detached, ends, 1))


def test_the_triton_path_compiles_into_one_graph(device: str) -> None:
    given = inputs(device, 1, 13, 2, 2, sequences=3, ahead=True)
    ends = torch.tensor([0, 0, 6, 13], device=device)

    def f(arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        calls: dict[str, Any] = arguments
        return lti_scan(**calls, cu_seqlens=ends, backend="triton")

    outcomes = []
    for call in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        leaves: dict[str, Any] = {name: t.clone().requires_grad_() for name, t in given.items()}
        y, final = call(leaves)
        loss = y.square().sum() + final.square().sum()
        outcomes.append([y, final, *torch.autograd.grad(loss, list(leaves.values()))])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


def test_two_runs_give_the_same_bits(device: str) -> None:
    given = inputs(device, 3, 70)
    first, second = (run(given, "triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_flop_counter_sees_the_operators(device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    given = inputs(device, 2, 70)
    leaves: dict[str, Any] = {name: t.requires_grad_() for name, t in given.items()}
    with FlopCounterMode(display=False) as counter:
        y, _ = lti_scan(**leaves, backend="triton")
    assert counter.get_total_flops() == flops(2, 70, 2, 4)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() > flops(2, 70, 2, 4)


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize(("channels", "modes", "length"), [(2, 33, 256), (3, 4, 300), (1, 2, 1)])
def test_kernels_of_systems_and_moments_meet_float64(
    device: str, monkeypatch: pytest.MonkeyPatch, channels: int, modes: int, length: int, sequences: int
) -> None:
    monkeypatch.setattr(vandermonde, "_by_kernels", lambda tensor, dtype: dtype == torch.float32)
    monkeypatch.setattr(vandermonde, "TABLE_ELEMENTS", 2000)  # more than one block of channels
    given = inputs(device, 1, 1, channels, modes)
    log_a, c = given["log_a"], torch.randn(sequences, channels, modes, 2, device=device)
    dk = torch.randn(sequences, channels, length, device=device)
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        leaves = [part.to(dtype).requires_grad_() for part in (log_a, c)]
        kernel = vandermonde.lti_kernel(*leaves, length)
        moments = vandermonde.lti_moments(leaves[0], dk.to(dtype))
        outcomes.append([kernel, moments, *torch.autograd.grad(kernel, leaves, dk.to(dtype))])
    for value, exact in zip(*outcomes, strict=True):
        assert value.dtype == torch.float32
        assert (value - exact).norm() <= 1e-6 * exact.norm()


def test_phases_of_many_turns_are_exact(device: str) -> None:
    from zoo.ops.lti.kernels.levels import level

    log_a = torch.tensor([[[0.0, 3.0], [-1e-6, 1e-3], [0.0, -31.7]]], dtype=torch.float64, device=device)
    table = level(log_a, None, 40, 1031)[0, 0]
    angle = log_a[0, :, 1:] * torch.arange(40, device=device) * 1031
    size = (log_a[0, :, :1] * torch.arange(40, device=device) * 1031).exp()
    exact = torch.cat([size * angle.cos(), size * angle.sin()])
    torch.testing.assert_close(table, exact.float(), rtol=0, atol=1e-7)


def test_what_the_kernels_do_not_serve_is_refused_in_words(device: str) -> None:
    with pytest.raises(BackendError, match="at most 128 modes of a channel, log_a has 129"):
        lti_scan(**inputs(device, 1, 5, 1, 129), backend="triton")
    given = {name: t.requires_grad_() for name, t in inputs(device, 1, 5).items()}
    y, _ = lti_scan(**given, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), given["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="pass backend='reference' for double backward"):
        dx.sum().backward()

"""The Triton kernels of the long convolution against the definition: tiles, gates, transforms and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.ops import long_convolution, record_dispatch
from zoo.ops.long_convolution import crossover, triton_path
from zoo.ops.long_convolution.kernels import dense_launch, spectra

from sequence_mixer.conformance.budget import judge
from sequence_mixer.conformance.comparing import usual_error
from sequence_mixer.errors import BackendError

PACKINGS = [[0, 1, 1, 3, 13, 17, 17, 130], [0, 0, 2, 2], [0, 0, 97]]


def inputs(
    device: str, batch: int, tokens: int, channels: int = 2, taps: int = 5, ahead: int = 0, gates: bool = True
) -> dict[str, Any]:
    torch.manual_seed(tokens * 100 + taps)
    made = {
        "x": torch.randn(batch, tokens, channels),
        "kernel": torch.randn(channels, taps),
        "D": torch.randn(channels),
    }
    if gates:
        made |= {name: torch.randn(batch, tokens, channels) for name in ("pre_gate", "post_gate")}
    if ahead:
        made["reverse_kernel"] = torch.randn(channels, ahead)
    return {name: tensor.to(device) for name, tensor in made.items()}


def run(given: dict[str, Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """y and the gradients of the inputs for a fixed cotangent."""
    leaves: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in given.items()}
    y = long_convolution(**leaves, backend=backend, **options)
    torch.manual_seed(5)
    dy = torch.randn(y.shape).bfloat16().to(y.device, y.dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def check(given: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> None:
    """Triton at `dtype` beside the definition in float64 and the plain path at `dtype`."""
    given = {name: t.to(dtype) if t.dim() == 3 else t for name, t in given.items()}
    exact = run({name: t.double() for name, t in given.items()}, "reference", **options)
    plain = run(given, "chunked", **options)
    usual = usual_error(plain, exact)  # a gradient of two or three numbers is one draw of the error
    for name, value in run(given, "triton", **options).items():
        assert value.dtype == plain[name].dtype, name
        verdict = judge(value, exact[name], plain[name], dtype, plain_error=usual)
        assert verdict.ok, f"{name}: {verdict}"


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 130])
@pytest.mark.parametrize("gates", [False, True])
def test_every_length_meets_the_definition(device: str, tokens: int, gates: bool) -> None:
    check(inputs(device, 2, tokens, gates=gates), torch.float32)


@pytest.mark.parametrize(("taps", "ahead", "lag"), [(1, 0, 0), (33, 1, 1), (64, 0, 0), (70, 4, 0), (200, 3, 1)])
def test_every_number_of_taps_meets_the_definition(device: str, taps: int, ahead: int, lag: int) -> None:
    check(inputs(device, 1, 70, taps=taps, ahead=ahead), torch.float32, reverse_lag=lag)


@pytest.mark.parametrize(
    ("tokens", "taps", "ahead"), [(1, 1, 0), (33, 60, 9), (64, 64, 64), (70, 5, 200), (130, 20, 0)]
)
def test_unpacked_rows_in_bfloat16_meet_the_definition(device: str, tokens: int, taps: int, ahead: int) -> None:
    check(inputs(device, 3, tokens, taps=taps, ahead=ahead, gates=False), torch.bfloat16, reverse_lag=1)


@pytest.mark.parametrize("blocks", [(64, 64, 128, 8, 8, 4, 3), (128, 64, 64, 4, 8, 8, 3), (64, 128, 64, 2, 4, 8, 2)])
@pytest.mark.parametrize("mirror", [False, True])
def test_every_block_size_makes_the_same_product(device: str, blocks: tuple[int, ...], mirror: bool) -> None:
    torch.manual_seed(1)
    u_t = torch.randn(2, 3, 200, device=device).bfloat16()
    taps = torch.randn(2, 150, device=device).bfloat16()
    y_t = dense_launch.toeplitz(u_t, taps.float(), 60, mirror=mirror, blocks=dense_launch.Blocks(*blocks))
    lag = torch.arange(200, device=device).unsqueeze(1) - torch.arange(200, device=device) + 60
    matrix = torch.where((lag >= 0) & (lag < 150), taps.double()[:, lag.clamp(0, 149)], 0.0)
    exact = (u_t.double() @ matrix) if mirror else (u_t.double() @ matrix.mT)
    assert float((y_t - exact).norm() / exact.norm()) < 8e-3  # the interpreter cuts bfloat16 off: twice the rounding


@pytest.mark.parametrize(
    "blocks", [(64, 64, 8, 64, 4, 2, None), (64, 256, 8, 64, 8, 2, 128), (128, 256, 4, 32, 8, 2, None)]
)
@pytest.mark.parametrize(("taps", "ahead"), [(150, 60), (700, 0), (900, 500)])
def test_every_block_size_makes_the_same_tap_gradient(
    device: str, blocks: tuple[Any, ...], taps: int, ahead: int
) -> None:
    torch.manual_seed(1)
    u_t, dy_t = (torch.randn(2, 3, 200, device=device).bfloat16() for _ in range(2))
    found = dense_launch.tap_gradient(u_t, dy_t, taps, ahead, dense_launch.PairBlocks(*blocks))
    exact = exact_tap_gradient(u_t, dy_t, taps, ahead)
    assert float((found - exact).norm() / exact.norm()) < 1e-6
    by_transforms = spectra.tap_gradient(u_t, dy_t, taps, ahead)
    assert float((by_transforms - exact).norm() / exact.norm()) < 1e-6


def exact_tap_gradient(u_t: Tensor, dy_t: Tensor, taps: int, ahead: int) -> Tensor:
    """The gradient [D,taps] in float64 from u_t and dy_t [D,B,200]."""
    step = torch.arange(200, device=u_t.device)
    lag = step.unsqueeze(1) - step + ahead
    inside = (lag >= 0) & (lag < taps)
    pairs = torch.where(inside, dy_t.double().mT @ u_t.double(), 0.0).flatten(1)
    return pairs.new_zeros(2, taps).index_add_(1, lag.clamp(0, taps - 1).flatten(), pairs)


@pytest.mark.parametrize(("tokens", "taps", "ahead"), [(33, 60, 9), (130, 20, 0)])
def test_the_gradient_of_the_taps_may_come_by_transforms(
    device: str, tokens: int, taps: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(crossover.GRADIENT_LONGEST, torch.bfloat16, 1)
    check(inputs(device, 3, tokens, taps=taps, ahead=ahead), torch.bfloat16)


@pytest.mark.parametrize(("taps", "ahead", "lag"), [(140, 0, 0), (100, 90, 1)])
@pytest.mark.parametrize("gates", [False, True])
def test_transforms_between_fused_gates_meet_the_definition(
    device: str, taps: int, ahead: int, lag: int, gates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(device, 2, 135, taps=taps, ahead=ahead, gates=gates)
    check(given, torch.float32, reverse_lag=lag)
    monkeypatch.setitem(crossover.LONGEST, torch.bfloat16, 16)
    check(given, torch.bfloat16, reverse_lag=lag)


@pytest.mark.parametrize("n", [2, 6, 10, 64, 2560])
def test_packed_transforms_convolve_in_a_circle(device: str, n: int) -> None:
    torch.manual_seed(n)
    u_n, dy_n = (torch.randn(2, 3, n, device=device) for _ in range(2))
    taps_n = torch.randn(2, n, device=device)
    y_n, u_f, taps_f = spectra.convolve(u_n, taps_n)
    du_n, dtaps_n = spectra.gradients(dy_n, u_f, taps_f)
    u, dy, taps = (torch.fft.fft(t.double()) for t in (u_n, dy_n, taps_n))
    exact = (u * taps.unsqueeze(1), dy * taps.unsqueeze(1).conj(), (dy * u.conj()).sum(1))
    for found, spectrum in zip((y_n, du_n, dtaps_n), exact, strict=True):
        wanted = torch.fft.ifft(spectrum).real
        assert float((found - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize(("taps", "ahead", "tokens"), [(140, 0, 135), (100, 90, 135), (300, 0, 300)])
def test_the_gradient_of_the_skip_beside_transforms_is_rounded_once(
    device: str, taps: int, ahead: int, tokens: int
) -> None:
    given = inputs(device, 2, tokens, 16, taps=taps, ahead=ahead, gates=False)
    exact = run({name: t.double() for name, t in given.items()}, "reference")["dD"]
    error = run(given, "triton")["dD"].double() - exact
    assert float(error.norm() / exact.norm()) < 1e-7  # a sum in float32 or a tap of the transforms: 1.1e-7 and more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_budget(device: str, dtype: torch.dtype) -> None:
    check(inputs(device, 2, 130, taps=130, ahead=7), dtype)


@pytest.mark.parametrize(("batch", "tokens", "channels"), [(20, 65, 2), (1, 3, 70)])
def test_many_rows_or_channels_fill_several_programs(device: str, batch: int, tokens: int, channels: int) -> None:
    check(inputs(device, batch, tokens, channels, taps=9), torch.float32)


@pytest.mark.parametrize("ends", PACKINGS)
@pytest.mark.parametrize("ahead", [0, 20])
def test_packed_sequences_meet_the_definition(device: str, ends: list[int], ahead: int) -> None:
    given = inputs(device, 1, ends[-1], taps=50, ahead=ahead)
    check(given, torch.float32, cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device), reverse_lag=1)


def test_packed_rows_with_many_taps_are_served_to_who_asks(device: str) -> None:
    given = inputs(device, 1, 150, taps=150)
    ends = torch.tensor([0, 20, 150], device=device)
    check(given, torch.float32, cu_seqlens=ends)
    with record_dispatch() as record:
        long_convolution(**given, cu_seqlens=ends)
    assert record[0].backend == "fft"
    assert "beyond 128 taps at this dtype; this call has 150" in record[0].reasons["triton"]


@pytest.mark.parametrize("only", ["pre_gate", "post_gate"])
def test_one_gate_alone_is_served(device: str, only: str) -> None:
    given = inputs(device, 2, 40)
    check({name: t for name, t in given.items() if name == only or "gate" not in name}, torch.float32)


def test_non_contiguous_inputs_and_cotangents_are_served(device: str) -> None:
    given = inputs(device, 2, 40, 4)
    given["x"] = torch.randn(2, 40, 12, device=device)[:, :, 4:8]
    given["pre_gate"] = torch.randn(2, 4, 40, device=device).transpose(1, 2)
    given["post_gate"] = torch.randn(40, 2, 4, device=device).transpose(0, 1)
    given["kernel"] = torch.randn(5, 4, device=device).t()
    check(given, torch.float32)
    gradients = []
    for backend in ("triton", "chunked"):
        leaves: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in given.items()}
        y = long_convolution(**leaves, backend=backend)
        gradients.append(torch.autograd.grad(y.sum(), list(leaves.values())))  # the cotangent has stride 0 everywhere
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("packed", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)])
def test_what_stood_in_memory_does_not_matter(
    device: str, packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {name: t.to(dtype) for name, t in inputs(device, 1, 70, taps=20, ahead=3).items()}
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


def test_nothing_crosses_a_boundary_even_nan(device: str) -> None:
    given = inputs(device, 1, 70, taps=60, ahead=60)
    given["x"][:, 4:37] = float("nan")
    given["x"].requires_grad_()
    y = long_convolution(**given, cu_seqlens=torch.tensor([0, 4, 37, 70], device=device), backend="triton")
    dx = torch.autograd.grad(y, given["x"], torch.ones_like(y))[0]
    for value in (y, dx):
        assert bool(value[:, :4].isfinite().all())
        assert bool(value[:, 37:].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_tokens_leave_earlier_outputs_of_tiles_exactly_alone(device: str, dtype: torch.dtype) -> None:
    given = {name: t.to(dtype) for name, t in inputs(device, 1, 130, taps=100).items()}
    changed = given | {"x": given["x"].clone()}
    changed["x"][:, 77:] *= 1e6
    before, after = (long_convolution(**call, backend="triton")[:, :77] for call in (given, changed))
    assert torch.equal(before, after)


def test_the_custom_operators_keep_their_promises(device: str) -> None:
    x, gate = (torch.randn(1, 9, 2, device=device, requires_grad=True) for _ in range(2))
    u_t = torch.randn(2, 1, 9, device=device, requires_grad=True)
    taps = torch.randn(2, 4, device=device, requires_grad=True)
    ends = torch.tensor([0, 2, 9], device=device)
    torch.library.opcheck(triton_path.long_convolution_in, (x, gate, True, 12))
    torch.library.opcheck(triton_path.long_convolution_out, (u_t, gate, torch.float32, 9))
    torch.library.opcheck(
        triton_path.long_convolution_skip, (u_t.detach()[:, :, :4], u_t[:, :, :4].clone(), taps[:, 0])
    )
    rows = torch.randn(2, 1, 10, device=device, requires_grad=True)
    taps_n = torch.randn(2, 10, device=device, requires_grad=True)
    torch.library.opcheck(triton_path.long_convolution_circular, (rows, taps_n))
    torch.library.opcheck(
        triton_path.long_convolution_circular_backward, (rows.detach(), rows.detach() + 1, taps_n.detach())
    )
    torch.library.opcheck(triton_path.long_convolution_toeplitz, (u_t, taps, 1, ends))
    torch.library.opcheck(triton_path.long_convolution_plain, (x, taps, 1, ends))
    bare = [t.detach() for t in (x, gate, u_t, taps)]
    torch.library.opcheck(triton_path.long_convolution_gates_backward, (bare[2], bare[0], bare[1]))
    torch.library.opcheck(triton_path.long_convolution_toeplitz_backward, (bare[2], bare[2], bare[3], 1, None))
    torch.library.opcheck(triton_path.long_convolution_plain_backward, (bare[0], bare[2], bare[3], 1, None))


@pytest.mark.parametrize("taps", [9, 140])
def test_the_triton_path_compiles_into_one_graph(device: str, taps: int) -> None:
    given = inputs(device, 1, 140, taps=taps)

    def f(arguments: dict[str, Tensor]) -> Tensor:
        calls: dict[str, Any] = arguments
        return long_convolution(**calls, backend="triton")

    outcomes = []
    for call in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        leaves: dict[str, Any] = {name: t.clone().requires_grad_() for name, t in given.items()}
        y = call(leaves)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(device: str, dtype: torch.dtype) -> None:
    given = {name: t.to(dtype) for name, t in inputs(device, 3, 130, taps=40, ahead=3).items()}
    first, second = (run(given, "triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_flop_counter_sees_the_tiles(device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from zoo.ops.long_convolution import flops

    given = inputs(device, 2, 70, taps=9)
    leaves: dict[str, Any] = {name: t.requires_grad_() for name, t in given.items()}
    with FlopCounterMode(display=False) as counter:
        long_convolution(**leaves, backend="triton").sum().backward()
    assert counter.get_total_flops() == 3 * flops(2, 70, 2, 9, direct=True)


def test_what_the_kernels_do_not_serve_is_refused_in_words(device: str) -> None:
    with pytest.raises(BackendError, match="x is empty"):
        long_convolution(**inputs(device, 1, 0), backend="triton")
    given = {name: t.requires_grad_() for name, t in inputs(device, 1, 5).items()}
    y = long_convolution(**given, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), given["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="pass backend='reference' for double backward"):
        dx.sum().backward()

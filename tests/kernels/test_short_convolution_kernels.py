"""The Triton kernels of the short convolution against the definition: values and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.ops import short_convolution
from zoo.ops.short_convolution import flops, triton_path
from zoo.ops.short_convolution.kernels import banded_launch, looped, walk

from sequence_mixer.conformance.budget import judge
from sequence_mixer.errors import BackendError

NAMES = ("x", "weight", "bias", "initial_state")
PACKINGS = [[0, 1, 1, 3, 13, 17, 17, 45], [0, 0, 2, 2], [0, 23], [0, 0, 129]]
USUAL = {name: dict(getattr(walk, name)) for name in ("FORWARD", "BACKWARD")}


@pytest.fixture(autouse=True)
def short_spans(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of 8 and 16 tokens in the interpreter: lengths that it can afford cross several, and blocks of channels."""
    if device == "cpu":
        monkeypatch.setattr(walk, "FORWARD", walk.FORWARD | {"SPAN": 8, "BLOCK_D": 32})
        monkeypatch.setattr(walk, "BACKWARD", walk.BACKWARD | {"SPAN": 16, "BLOCK_D": 32})


def inputs(
    device: str, batch: int, tokens: int, channels: int, width: int, sequences: int | None = None
) -> dict[str, Any]:
    torch.manual_seed(tokens * 100 + width)
    made = {
        "x": torch.randn(batch, tokens, channels),
        "weight": torch.randn(channels, width),
        "bias": torch.randn(channels),
        "initial_state": torch.randn(sequences or batch, channels, width - 1),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def run(given: dict[str, Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """y, final state, and the gradients of the inputs for fixed cotangents."""
    leaves: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in given.items()}
    y, final = short_convolution(**leaves, backend=backend, **options)
    torch.manual_seed(5)
    dy, dfinal = (torch.randn(t.shape).to(torch.bfloat16).to(t.device, t.dtype) for t in (y, final))
    gradients = torch.autograd.grad((y, final), list(leaves.values()), (dy, dfinal))
    return {"y": y, "final": final} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def check(given: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> None:
    """Triton at `dtype` beside the definition in float64 and the plain path at `dtype`."""
    given = {name: t.to(dtype) for name, t in given.items()}
    exact = run({name: t.double() for name, t in given.items()}, "reference", **options)
    plain = run(given, "chunked", **options)
    for name, value in run(given, "triton", **options).items():
        assert value.dtype == dtype
        verdict = judge(value, exact[name], plain[name], dtype)
        assert verdict.ok, f"{name}: {verdict}"


@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 16, 17, 35])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_every_length_meets_the_definition(device: str, tokens: int, activation: str | None) -> None:
    check(inputs(device, 2, tokens, 24, 4), torch.float32, activation=activation)


def test_spans_of_the_usual_length_meet_the_definition(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options in USUAL.items():
        monkeypatch.setattr(walk, name, options)
    check(inputs(device, 1, 70, 24, 3), torch.float32, activation="silu")


def test_more_spans_than_the_second_axis_of_a_grid_holds_are_served(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "MOST_SPANS", 3)
    assert walk.grid_of(3, 70, 32) == ((3, 3), False)
    assert walk.grid_of(4, 70, 32) == ((12,), True)
    check(inputs(device, 2, 17, 40, 4), torch.float32, activation="silu")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [255, 256, 257, 1031])
def test_long_rows_meet_the_definition(device: str, tokens: int) -> None:
    if device != "cuda":
        pytest.skip("needs a CUDA device: too long for Triton's interpreter")
    check(inputs(device, 2, tokens, 300, 4), torch.bfloat16, activation="silu")


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
def test_every_number_of_taps_meets_the_definition(device: str, width: int) -> None:
    check(inputs(device, 2, 19, 40, width), torch.float32, activation="silu")


@pytest.mark.parametrize(
    ("tokens", "width", "channels", "dtype"),
    [(1, 9, 24, torch.float32), (33, 16, 70, torch.float32), (20, 64, 8, torch.float32), (17, 33, 24, torch.bfloat16)],
)
def test_many_taps_meet_the_definition(device: str, tokens: int, width: int, channels: int, dtype: torch.dtype) -> None:
    check(inputs(device, 2, tokens, channels, width), dtype)


@pytest.mark.parametrize("ends", PACKINGS[:2])
def test_many_taps_meet_the_definition_in_packed_sequences(device: str, ends: list[int]) -> None:
    given = inputs(device, 1, ends[-1], 24, 11, sequences=len(ends) - 1)
    check(given, torch.float32, cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device))
    given = {name: t for name, t in given.items() if name in ("x", "weight")}
    check(given, torch.float32, cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device))


@pytest.mark.parametrize(
    ("tokens", "width", "channels", "dtype"),
    [(1, 9, 16, torch.bfloat16), (45, 20, 32, torch.bfloat16), (37, 40, 16, torch.float16)],
)
def test_many_taps_on_tensor_cores_stay_within_budget(
    device: str, tokens: int, width: int, channels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("looped_forward", "looped_backward"):
        monkeypatch.setattr(looped, name, None)  # nothing else serves so many taps
    check(inputs(device, 2, tokens, channels, width), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width", "channels"), [(300, 64, 80), (1031, 65, 16), (130, 33, 512)])
def test_long_rows_of_many_taps_stay_within_budget(device: str, tokens: int, width: int, channels: int) -> None:
    if device != "cuda":
        pytest.skip("needs a CUDA device: too long for Triton's interpreter")
    for dtype in (torch.bfloat16, torch.float16):
        check(inputs(device, 3, tokens, channels, width), dtype)


def test_tensor_cores_serve_half_precision_of_whole_sectors() -> None:
    x = torch.empty(1, 1, 32, dtype=torch.bfloat16)
    served = [width for width in range(1, 300) if banded_launch.banded_serves(x, width)]
    assert served == list(range(9, 66))
    assert banded_launch.banded_serves(x.half(), 9)
    assert not banded_launch.banded_serves(x.float(), 9)
    assert not banded_launch.banded_serves(x[..., :24], 9)


def test_spans_are_short_where_programs_would_be_few() -> None:
    assert banded_launch.span_of(8, 4096, 2048) == 1024
    assert banded_launch.span_of(1, 4096, 2048) == 256  # 16 spans, of 128 programs
    assert banded_launch.span_of(2, 50, 64) == 64
    assert banded_launch.span_of(4096, 100, 2048) == 128


def test_several_blocks_of_spans_add_up(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded_launch, "SPANS", (16, 16))
    monkeypatch.setattr(banded_launch, "PROGRAMS", 1)  # all blocks of a channel in one program or two
    given = {name: t for name, t in inputs(device, 17, 11, 16, 10).items() if name in ("x", "weight")}  # 17 spans
    check(given, torch.bfloat16)


@pytest.mark.parametrize("ends", PACKINGS[:2])
def test_many_taps_on_tensor_cores_see_one_packed_sequence_each(
    device: str, ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(banded_launch, "SPANS", (16, 16))
    given = inputs(device, 1, ends[-1], 16, 11, sequences=len(ends) - 1)
    options = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32, device=device)}
    check(given, torch.bfloat16, **options)
    given = {name: t for name, t in given.items() if name in ("x", "weight")}
    check(given, torch.bfloat16, **options)


def test_nothing_crosses_a_boundary_of_many_taps_even_nan(device: str) -> None:
    given = {name: t.bfloat16() for name, t in inputs(device, 1, 40, 16, 20).items() if name in ("x", "weight")}
    given["x"][:, 17:20] = float("nan")
    given["x"].requires_grad_()
    ends = torch.tensor([0, 17, 20, 40], device=device)
    y, _ = short_convolution(**given, cu_seqlens=ends, backend="triton")
    dx = torch.autograd.grad(y, given["x"], torch.ones_like(y))[0]
    for value in (y[:, :17], y[:, 20:], dx):
        assert bool(value.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_taps_keep_more_digits_than_half_inputs(device: str, dtype: torch.dtype) -> None:
    """Two tokens of opposite sign leave what half precision cannot hold of the taps they meet."""
    x = torch.zeros(1, 24, 16, dtype=dtype, device=device)
    x[:, 3], x[:, 5] = 2.0**-4, -(2.0**-4)
    size = 2.0 ** torch.linspace(-3, 18, 16, device=device).round()  # float16 ends at 2^16
    weight = torch.zeros(16, 12, device=device)
    weight[:, 11], weight[:, 9] = size, size * (1 + 2.0**-14)
    y, _ = short_convolution(x, weight, backend="triton")
    torch.testing.assert_close(y[0, 5], (size * 2.0**-18).to(dtype))


def test_many_taps_of_a_slice_and_of_an_expanded_cotangent_are_served(device: str) -> None:
    wide = torch.randn(2, 19, 96, device=device).bfloat16()
    leaves = {"x": wide[:, :, 16:32], "weight": torch.randn(9, 16, device=device).t()}
    for name, t in leaves.items():
        leaves[name] = t.detach().requires_grad_()
    found = []
    for backend in ("triton", "reference"):
        y, _ = short_convolution(**leaves, backend=backend)
        found.append([y, *torch.autograd.grad(y.sum(), list(leaves.values()))])  # of stride 0 everywhere
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("packed", [False, True])
def test_what_stood_in_memory_does_not_matter_to_many_taps(
    device: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {n: t.bfloat16() for n, t in inputs(device, 1, 21, 16, 9, sequences=3 if packed else 1).items()}
    ends = torch.tensor([0, 2, 2, 21], device=device) if packed else None
    clean = run(given, "triton", cu_seqlens=ends)
    empty = torch.empty

    def full_of_nan(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", full_of_nan)
    dirty = run(given, "triton", cu_seqlens=ends)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 18])
def test_half_precision_stays_within_its_budget(device: str, dtype: torch.dtype, tokens: int) -> None:
    check(inputs(device, 2, tokens, 24, 4), dtype, activation="silu")


@pytest.mark.parametrize("ends", PACKINGS)
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_packed_sequences_meet_the_definition(device: str, ends: list[int], width: int, activation: str | None) -> None:
    given = inputs(device, 1, ends[-1], 24, width, sequences=len(ends) - 1)
    check(given, torch.float32, activation=activation, cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device))


@pytest.mark.parametrize("left_out", [("bias",), ("initial_state",), ("bias", "initial_state")])
@pytest.mark.parametrize("packed", [False, True])
def test_bias_and_initial_state_may_be_left_out(device: str, left_out: tuple[str, ...], packed: bool) -> None:
    given = inputs(device, 1, 21, 24, 4, sequences=3 if packed else 1)
    ends = torch.tensor([0, 2, 2, 21], device=device) if packed else None
    check({k: v for k, v in given.items() if k not in left_out}, torch.float32, activation="silu", cu_seqlens=ends)


def test_parameters_and_state_may_be_float32_beside_half_inputs(device: str) -> None:
    given = inputs(device, 2, 19, 24, 4)
    given["x"] = given["x"].bfloat16()
    got, plain = (run(given, backend, activation="silu") for backend in ("triton", "chunked"))
    rounded = {name: t.double() for name, t in given.items()}
    rounded["initial_state"] = given["initial_state"].bfloat16().double()
    exact = run(rounded, "reference", activation="silu")
    for name, value in got.items():
        assert value.dtype == plain[name].dtype, name
        verdict = judge(value, exact[name], plain[name], torch.bfloat16)
        assert verdict.ok, f"{name}: {verdict}"


def test_non_contiguous_inputs_and_cotangents_are_served(device: str) -> None:
    wide = torch.randn(2, 19, 96, device=device)
    given = {
        "x": wide[:, :, 16:40],
        "weight": torch.randn(4, 24, device=device).t(),
        "bias": torch.randn(48, device=device)[::2],
        "initial_state": torch.randn(2, 3, 24, device=device).transpose(1, 2),
    }
    check(given, torch.float32, activation="silu")
    given["x"] = torch.randn(2, 24, 19, device=device).transpose(1, 2)
    check(given, torch.float32, activation="silu")
    leaves: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in given.items()}
    for backend in ("triton", "reference"):
        y, _ = short_convolution(**leaves, backend=backend)
        y.sum().backward()  # the cotangent has stride 0 everywhere
    twice = {name: t.grad for name, t in leaves.items()}
    for t in leaves.values():
        t.grad = None
    short_convolution(**leaves, backend="reference")[0].sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(twice[name], 2 * leaf.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_what_stood_in_memory_does_not_matter(device: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(device, 1, 37, 24, 4, sequences=3 if packed else 1)
    options: dict[str, Any] = {
        "activation": "silu",
        "cu_seqlens": torch.tensor([0, 2, 2, 37], device=device) if packed else None,
    }
    clean = run(given, "triton", **options)
    empty = torch.empty

    def full_of_nan(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", full_of_nan)
    dirty = run(given, "triton", **options)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


def test_nothing_crosses_a_boundary_even_nan(device: str) -> None:
    given = inputs(device, 1, 20, 24, 4)
    del given["initial_state"]
    given["x"][:, 4:7] = float("nan")
    given["x"].requires_grad_()
    ends = torch.tensor([0, 4, 7, 20], device=device)
    y, _ = short_convolution(**given, activation="silu", cu_seqlens=ends, backend="triton")
    dx = torch.autograd.grad(y, given["x"], torch.ones_like(y))[0]
    for value in (y, dx):
        assert bool(value[:, :4].isfinite().all())
        assert bool(value[:, 7:].isfinite().all())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_the_custom_operators_keep_their_promises(device: str, packed: bool, full: bool) -> None:
    given = inputs(device, 1, 9, 8, 4, sequences=2 if packed else 1)
    leaves: list[Tensor | None] = [t.requires_grad_() for t in given.values()]
    if not full:
        leaves[2:] = [None, None]
    ends = torch.tensor([0, 2, 9], device=device) if packed else None
    torch.library.opcheck(triton_path.short_convolution_fwd, (*leaves, ends, True))
    outputs = triton_path.short_convolution_fwd(*leaves, ends, True)
    cotangents = [torch.randn_like(t) for t in outputs]
    detached = [None if t is None else t.detach() for t in leaves]
    torch.library.opcheck(triton_path.short_convolution_bwd, (*cotangents, *detached, ends, True))


@pytest.mark.parametrize("packed", [False, True])
def test_the_triton_path_compiles_into_one_graph(device: str, packed: bool) -> None:
    given = inputs(device, 1, 13, 8, 4, sequences=3 if packed else 1)
    ends = torch.tensor([0, 0, 6, 13], device=device) if packed else None

    def f(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
        return short_convolution(
            x, weight, bias, activation="silu", initial_state=state, cu_seqlens=ends, backend="triton"
        )

    outcomes = []
    for call in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        leaves: list[Any] = [t.clone().requires_grad_() for t in given.values()]
        y, final = call(*[*leaves, ends])
        outcomes.append([y, final, *torch.autograd.grad(y.square().sum() + final.square().sum(), leaves)])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


def test_two_runs_give_the_same_bits(device: str) -> None:
    given = inputs(device, 2, 33, 24, 4)
    first, second = (run(given, "triton", activation="silu") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_flop_counter_sees_the_operators(device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    given = inputs(device, 2, 9, 8, 4)
    leaves: dict[str, Any] = {name: t.requires_grad_() for name, t in given.items()}
    with FlopCounterMode(display=False) as counter:
        y, _ = short_convolution(**leaves, backend="triton")
        y.sum().backward()
    assert counter.get_total_flops() == 3 * flops(2, 9, 8, 4)


def test_what_the_kernels_do_not_serve_is_refused_in_words(device: str) -> None:
    with pytest.raises(BackendError, match="takes up to W=8 taps with an activation, weight has 9"):
        short_convolution(**inputs(device, 1, 5, 8, 9), activation="silu", backend="triton")
    with pytest.raises(BackendError, match="takes up to W=256 taps without an activation, weight has 257"):
        short_convolution(**inputs(device, 1, 5, 8, 257), backend="triton")
    given = inputs(device, 1, 0, 8, 4)
    with pytest.raises(BackendError, match="x is empty"):
        short_convolution(**given, backend="triton")
    given = {name: t.double() for name, t in inputs(device, 1, 5, 8, 4).items()}
    with pytest.raises(BackendError, match="the input is float64"):
        short_convolution(**given, backend="triton")
    x = inputs(device, 1, 5, 8, 4)["x"].requires_grad_()
    y, _ = short_convolution(x, inputs(device, 1, 5, 8, 4)["weight"], backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference' for double backward"):
        dx.sum().backward()

"""The diagonal scan: definition against recorded results, plain paths against definition, states, kernels, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from zoo.ops import lti_scan, record_dispatch
from zoo.ops.lti import lti_kernel, lti_moments

from golden import GoldenCase, load_case
from sequence_mixer.conformance.budget import judge, relative_rms
from sequence_mixer.errors import BackendError, ConfigError, DtypeError, PackingError, ShapeError

PATHS = ["reference", "chunked", "fft"]
PACKINGS = [[0, 1, 1, 3, 13, 17, 17, 150, 215], [0, 0, 2, 2], [0, 129], [0, 0, 0]]


def inputs(
    batch: int, tokens: int, channels: int = 3, modes: int = 4, *, sequences: int | None = None, ahead: bool = False
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
    return {name: tensor.double() for name, tensor in made.items()}


def run(given: dict[str, Tensor], backend: str, **options: Any) -> list[Tensor]:
    """y, final state, and the gradients of the inputs for fixed cotangents."""
    leaves: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in given.items()}
    y, final = lti_scan(**leaves, backend=backend, **options)
    torch.manual_seed(5)
    loss = sum((t * torch.randn(t.shape, dtype=torch.float64).bfloat16()).double().sum() for t in (y, final))
    assert isinstance(loss, Tensor)
    return [y, final, *torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)]


@pytest.mark.parametrize("tokens", [1, 2, 5, 63, 64, 65, 128, 131])
@pytest.mark.parametrize("reverse_lag", [None, 0, 1])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("backend", ["chunked", "fft"])
def test_plain_paths_equal_the_definition(tokens: int, reverse_lag: int | None, state: bool, backend: str) -> None:
    given = inputs(2, tokens, ahead=reverse_lag is not None)
    if not state:
        del given["initial_state"]
    exact, plain = (run(given, path, reverse_lag=reverse_lag or 0) for path in ("reference", backend))
    for a, b in zip(plain, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("ends", PACKINGS)
@pytest.mark.parametrize("reverse_lag", [None, 0, 1])
@pytest.mark.parametrize("state", [False, True])
def test_packed_plain_path_equals_the_definition(ends: list[int], reverse_lag: int | None, state: bool) -> None:
    given = inputs(1, ends[-1], sequences=len(ends) - 1, ahead=reverse_lag is not None)
    if not state:
        del given["initial_state"]
    options = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32), "reverse_lag": reverse_lag or 0}
    exact, plain = (run(given, path, **options) for path in ("reference", "chunked"))
    for a, b in zip(plain, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_the_definition_is_the_recurrence() -> None:
    given = inputs(2, 9)
    a = torch.view_as_complex(given["log_a"]).exp()
    c = torch.view_as_complex(given["c"])
    state = torch.view_as_complex(given["initial_state"])
    y, final = lti_scan(**given, backend="reference")
    for t in range(9):
        state = a * state + given["x"][:, t].unsqueeze(-1)
        wanted = 2 * (c * state).sum(-1).real + given["D"] * given["x"][:, t]
        torch.testing.assert_close(y[:, t], wanted)
    torch.testing.assert_close(torch.view_as_complex(final), state)


@pytest.mark.parametrize("reverse_lag", [0, 1])
def test_the_kernel_ahead_begins_where_reverse_lag_says(reverse_lag: int) -> None:
    given = inputs(1, 6, channels=2, ahead=True)
    del given["initial_state"]
    kernel, ahead = (lti_kernel(given["log_a"], given[name], 6) for name in ("c", "c_reverse"))
    y, _ = lti_scan(**given, reverse_lag=reverse_lag, backend="reference")
    for t in range(6):
        wanted = given["D"] * given["x"][0, t]
        wanted = wanted + sum(kernel[:, t - j] * given["x"][0, j] for j in range(t + 1))
        wanted = wanted + sum(ahead[:, j - t - reverse_lag] * given["x"][0, j] for j in range(t + reverse_lag, 6))
        torch.testing.assert_close(y[0, t], wanted)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_packed_row_equals_its_sequences_alone(backend: str, ahead: bool) -> None:
    ends = PACKINGS[0]
    given = inputs(1, ends[-1], sequences=len(ends) - 1, ahead=ahead)
    y, final = lti_scan(**given, cu_seqlens=torch.tensor(ends), backend=backend)
    for s, (start, end) in enumerate(itertools.pairwise(ends)):
        alone = given | {"x": given["x"][:, start:end], "initial_state": given["initial_state"][s : s + 1]}
        y_alone, final_alone = lti_scan(**alone, backend=backend)
        torch.testing.assert_close(y[:, start:end], y_alone)
        torch.testing.assert_close(final[s : s + 1], final_alone)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("cut", [0, 1, 64, 66, 129, 130])
def test_two_parts_with_the_state_between_equal_the_whole(backend: str, cut: int) -> None:
    given = inputs(2, 130)
    whole, last = lti_scan(**given, backend=backend)
    first, state = lti_scan(**(given | {"x": given["x"][:, :cut]}), backend=backend)
    second, final = lti_scan(**(given | {"x": given["x"][:, cut:], "initial_state": state}), backend=backend)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(final, last)


@pytest.mark.parametrize("backend", PATHS)
def test_token_by_token_equals_the_whole(backend: str) -> None:
    given = inputs(2, 12)
    whole, last = lti_scan(**given, backend=backend)
    state, steps = given["initial_state"], []
    for token in given["x"].split(1, 1):
        y, state = lti_scan(**(given | {"x": token, "initial_state": state}), backend=backend)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    torch.testing.assert_close(state, last)


def test_later_tokens_leave_earlier_outputs_of_the_tiles_exactly_alone() -> None:
    given = inputs(1, 150)
    changed = given | {"x": given["x"].clone()}
    changed["x"][:, 77:] *= 1e6
    before, after = (lti_scan(**call, backend="chunked")[0][:, :77] for call in (given, changed))
    assert torch.equal(before, after)


def test_nothing_crosses_a_boundary_even_nan() -> None:
    given = inputs(1, 140, sequences=3, ahead=True)
    given["x"][:, 4:70] = float("nan")
    for backend in ("reference", "chunked"):
        y, final = lti_scan(**given, cu_seqlens=torch.tensor([0, 4, 70, 140]), backend=backend)
        assert bool(y[:, :4].isfinite().all())
        assert bool(y[:, 70:].isfinite().all())
        assert bool(final[[0, 2]].isfinite().all())


@pytest.mark.parametrize("backend", ["chunked", "fft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 33, 200])
def test_plain_paths_stay_within_a_few_roundings(backend: str, dtype: torch.dtype, tokens: int) -> None:
    given = {name: t.to(dtype).double() for name, t in inputs(2, tokens, 8, ahead=True).items()}
    exact = run(given, "reference")
    plain = run({name: t.to(dtype) for name, t in given.items()}, backend)
    assert plain[0].dtype == dtype
    assert plain[1].dtype == torch.float32
    for value, wanted in zip(plain, exact, strict=True):
        verdict = judge(value, wanted, None, dtype)
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("rate", [-1e-5, -5e-4, -5e-2])
@pytest.mark.parametrize("backend", ["chunked", "fft"])
def test_slow_modes_keep_float32_accuracy_over_16384_tokens(rate: float, backend: str) -> None:
    torch.manual_seed(0)
    turn = torch.pi * torch.arange(8.0) * torch.tensor([1e-3, 0.1])[:, None]
    log_a = torch.stack([torch.full((2, 8), rate), turn], -1)
    x, c, state = torch.randn(1, 16384, 2), torch.randn(2, 8, 2), torch.randn(1, 2, 8, 2)
    got = lti_scan(x, log_a, c, initial_state=state, backend=backend)
    exact = lti_scan(x.double(), log_a.double(), c.double(), initial_state=state.double(), backend="fft")
    for value, wanted in zip(got, exact, strict=True):
        assert relative_rms(value, wanted) < 5e-6


@pytest.mark.parametrize("rate", [-1e-5, -5e-4, -5e-2])
def test_kernels_keep_float32_accuracy_at_16384_lags(rate: float) -> None:
    torch.manual_seed(0)
    turn = torch.pi * torch.arange(32.0) * torch.logspace(-3, -1, 4)[:, None]
    log_a = torch.stack([torch.full((4, 32), rate), turn], -1).requires_grad_()
    c = torch.randn(4, 32, 2, requires_grad=True)
    weight = torch.randn(4, 16384)
    results = []
    for dtype in (torch.float32, torch.float64):
        kernel = lti_kernel(log_a.to(dtype), c.to(dtype), 16384)
        results.append([kernel, *torch.autograd.grad((kernel * weight).sum(), [log_a, c])])
        assert kernel.dtype == dtype
    for value, wanted in zip(*results, strict=True):
        assert relative_rms(value, wanted) < 1e-5


@pytest.mark.parametrize("length", [0, 1, 2, 3, 16, 17, 100])
@pytest.mark.parametrize("batched", [False, True])
def test_kernels_and_moments_are_the_vandermonde_products(length: int, batched: bool) -> None:
    given = inputs(1, length)
    c = torch.randn(5, 3, 4, 2, dtype=torch.float64) if batched else given["c"]
    weights = torch.randn(*([5] if batched else []), 3, length, dtype=torch.float64)
    powers = (torch.view_as_complex(given["log_a"]).unsqueeze(-1) * torch.arange(length)).exp()  # [D,M,L]
    wanted = 2 * (torch.view_as_complex(c).unsqueeze(-1) * powers).sum(-2).real
    torch.testing.assert_close(lti_kernel(given["log_a"], c, length), wanted)
    moments = lti_moments(given["log_a"], weights)
    torch.testing.assert_close(torch.view_as_complex(moments), (weights.unsqueeze(-2) * powers).sum(-1))


def test_kernels_and_moments_differentiate_twice() -> None:
    given = inputs(2, 5, channels=2, modes=2)
    log_a, c = given["log_a"].requires_grad_(), given["c"].requires_grad_()
    weights = given["x"].transpose(1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: lti_kernel(a, b, 5), (log_a, c))
    assert torch.autograd.gradgradcheck(lambda a, b: lti_kernel(a, b, 5), (log_a, c))
    assert torch.autograd.gradcheck(lti_moments, (log_a, weights))
    assert torch.autograd.gradgradcheck(lti_moments, (log_a, weights))


def test_tables_of_kernels_are_made_in_blocks_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.ops.lti import vandermonde

    given = inputs(2, 40, channels=5)
    weights = given["x"].transpose(1, 2)
    whole = lti_kernel(given["log_a"], given["c"], 40), lti_moments(given["log_a"], weights)
    monkeypatch.setattr(vandermonde, "TABLE_ELEMENTS", 150)
    blocked = lti_kernel(given["log_a"], given["c"], 40), lti_moments(given["log_a"], weights)
    for a, b in zip(whole, blocked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_the_definition_has_second_derivatives() -> None:
    leaves = {name: t.requires_grad_() for name, t in inputs(1, 4, 2, 2, ahead=True).items()}

    def f(*values: Tensor) -> tuple[Tensor, Tensor]:
        arguments: dict[str, Any] = dict(zip(leaves, values, strict=True))
        return lti_scan(**arguments, backend="reference")

    assert torch.autograd.gradgradcheck(f, list(leaves.values()))


def test_recorded_vandermonde_products_are_met() -> None:
    case = load_case("s4_vandermonde")
    t = case.tensors
    v, poles = t["in.v"].requires_grad_(), t["in.x"].requires_grad_()
    kernel = lti_kernel(poles, v, case.config["L"])
    assert relative_rms(kernel, t["y"]) < 1e-12
    (kernel * t["w"]).sum().backward()
    assert v.grad is not None
    assert poles.grad is not None
    assert relative_rms(v.grad, t["grad.v"]) < 1e-12
    assert relative_rms(poles.grad, t["grad.x"]) < 1e-12
    moments = torch.view_as_complex(lti_moments(poles.detach(), t["in.u"]))
    seen = torch.view_as_real(moments * torch.view_as_complex(v.detach()))
    assert relative_rms(seen, t["y_transpose"]) < 1e-12


def zero_order_hold(case: GoldenCase) -> tuple[Tensor, Tensor]:
    """log_a [D,M,2] and weights [channels,D,M,2] of a recorded S4D layer."""
    p = case.parameters()
    decay = torch.complex(-p["layer.kernel.A_real"].exp(), -p["layer.kernel.A_imag"])
    step = decay * p["layer.kernel.inv_dt"].exp()
    b, c = (torch.view_as_complex(p[f"layer.kernel.{name}"]) for name in "BC")
    weights = c * b * (step.exp() - 1) / decay
    return torch.view_as_real(step).contiguous(), torch.view_as_real(weights).contiguous()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("name", ["s4d_lin_zoh", "s4d_bidirectional"])
def test_recorded_s4d_layers_are_met_in_both_directions(name: str, backend: str) -> None:
    case = load_case(name)
    t, p = case.tensors, case.parameters()
    log_a, weights = zero_order_hold(case)
    ahead = weights[1] if case.config["layer"]["bidirectional"] else None
    y, _ = lti_scan(t["x"], log_a, weights[0], D=p["layer.D"][0], c_reverse=ahead, reverse_lag=1, backend=backend)
    out = F.glu(F.gelu(y) @ p["output_linear.0.weight"].t() + p["output_linear.0.bias"], -1)
    assert relative_rms(out, t["y"]) < 1e-10


@pytest.mark.parametrize(
    ("backend", "tokens", "packed"), [("chunked", 70, True), ("chunked", 1, False), ("fft", 9, False)]
)
def test_plain_paths_compile_into_one_graph(backend: str, tokens: int, packed: bool) -> None:
    given = inputs(1, tokens, sequences=3 if packed else 1, ahead=packed)
    ends = torch.tensor([0, 0, tokens // 2, tokens]) if packed else None

    def f(arguments: dict[str, Tensor], ends: Tensor | None) -> tuple[Tensor, Tensor]:
        calls: dict[str, Any] = arguments
        return lti_scan(**calls, cu_seqlens=ends, backend=backend)

    outcomes = []
    for call in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        leaves: dict[str, Any] = {name: t.clone().requires_grad_() for name, t in given.items()}
        y, final = call(leaves, ends)
        loss = y.square().sum() + final.square().sum()
        outcomes.append([y, final, *torch.autograd.grad(loss, list(leaves.values()))])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


def test_the_operators_of_kernels_keep_their_promises() -> None:
    given = inputs(2, 7)
    log_a, c = given["log_a"].requires_grad_(), given["c"].unsqueeze(0).requires_grad_()
    weights = given["x"].transpose(1, 2).contiguous().requires_grad_()
    torch.library.opcheck(torch.ops.zoo.lti_kernel.default, (log_a, c, 7, torch.float64))
    for kinds in (1, 2):
        torch.library.opcheck(torch.ops.zoo.lti_moments.default, (log_a, weights, kinds, torch.float64))


def test_one_compiled_graph_serves_any_number_of_kernels() -> None:
    log_a, c = -torch.rand(2, 3, 2), torch.randn(4, 2, 3, 2)
    torch._dynamo.mark_dynamic(c, 0)
    leaves = (log_a.requires_grad_(), c.requires_grad_())
    outcomes = []
    for fn in (lti_kernel, torch.compile(lti_kernel, backend="aot_eager", fullgraph=True)):
        outcomes.append(torch.autograd.grad(fn(*leaves, 9).square().sum(), leaves))
    for plain, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_autocast_does_not_reach_inside() -> None:
    given = {name: t.float() for name, t in inputs(1, 70).items()}
    plain, _ = lti_scan(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = lti_scan(**given)
        kernel = lti_kernel(given["log_a"], given["c"], 9)
    assert torch.equal(plain, inside)
    assert torch.equal(kernel, lti_kernel(given["log_a"], given["c"], 9))


def test_parameters_may_be_wider_than_tokens() -> None:
    given = inputs(2, 9, ahead=True)
    given["x"] = given["x"].bfloat16()
    leaves: dict[str, Any] = {name: t.requires_grad_() for name, t in given.items()}
    y, final = lti_scan(**leaves)
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    (y.float().sum() + final.sum()).backward()
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype


def test_a_cpu_call_is_served_by_the_tiles_and_says_why() -> None:
    with record_dispatch() as record:
        lti_scan(**inputs(1, 3))
    assert record[0].op == "lti_scan"
    assert record[0].backend == "chunked"
    assert "triton" in record[0].reasons


def test_wrong_calls_are_refused_in_words() -> None:
    given = inputs(2, 5)
    x, log_a, c = given["x"], given["log_a"], given["c"]
    with pytest.raises(ShapeError, match=r"x has shape \[5, 3\], wanted \[B, T, D\]"):
        lti_scan(x[0], log_a, c)
    with pytest.raises(ShapeError, match=r"log_a has shape \[2, 4, 2\], wanted \[D=3, M, 2\]"):
        lti_scan(x, log_a[:2], c)
    with pytest.raises(ShapeError, match=r"c has shape \[3, 3, 2\], wanted \[D=3, M=4, 2\]"):
        lti_scan(x, log_a, c[:, :3])
    with pytest.raises(ShapeError, match="at least one mode"):
        lti_scan(x, log_a[:, :0], c[:, :0])
    with pytest.raises(ShapeError, match=r"initial_state has shape \[2, 3, 4, 2\], wanted \[S=1, D=3, M=4, 2\]"):
        lti_scan(x[:1], log_a, c, initial_state=given["initial_state"], cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ConfigError, match="reverse_lag is 2"):
        lti_scan(x, log_a, c, reverse_lag=2)
    with pytest.raises(DtypeError, match=r"c is torch\.complex128.*real pairs"):
        lti_scan(x, log_a, torch.zeros(3, 4, 2, dtype=torch.complex128))
    with pytest.raises(PackingError, match="the input has batch 2"):
        lti_scan(x, log_a, c, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(BackendError, match="cu_seqlens packs several"):
        lti_scan(x[:1], log_a, c, cu_seqlens=torch.tensor([0, 5]), backend="fft")
    with pytest.raises(ShapeError, match=r"c has shape \[3, 3, 2\], wanted \[D=3, M=4, 2\]"):
        lti_kernel(log_a, c[:, :3], 5)
    with pytest.raises(ShapeError, match="length is -1"):
        lti_kernel(log_a, c, -1)


def test_slow_modes_do_not_drift_over_thousands_of_steps() -> None:
    log_a = torch.tensor([[[-1e-4, 3e-4], [-1e-5, 0.0]]], dtype=torch.float64)
    c = torch.ones(1, 2, 2, dtype=torch.float64)
    x = torch.randn(1, 4000, 1, dtype=torch.float64)
    state = torch.zeros(1, 1, 2, 2)
    for t in range(x.shape[1]):
        _, state = lti_scan(x[:, t : t + 1].float(), log_a.float(), c.float(), initial_state=state)
    _, exact = lti_scan(x.float().double(), log_a.float().double(), c, backend="reference")
    assert float((state - exact).norm() / exact.norm()) < 2e-6

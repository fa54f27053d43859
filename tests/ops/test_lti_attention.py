"""The LTI attention operator: the definition against a recurrence, its forms against the definition, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.dispatch import record_dispatch
from zoo.ops.linear_attention import linear_attention
from zoo.ops.lti_attention import flops, lti_attention
from zoo.ops.lti_attention.cost import plain_chunk
from zoo.ops.lti_attention.fft import convolved

from golden import load_case
from sequence_mixer.conformance.budget import judge, relative_rms, rms
from sequence_mixer.errors import BackendError, DtypeError, PackingError, ShapeError

FAST = ["chunked", "fft"]
LENGTHS = [1, 2, 63, 64, 65, 130, 257]
PACKED = [0, 0, 5, 69, 69, 70, 134, 151, 151]
WIDTHS = [1, 3, 9]  # gates around a scan, products of channels, scores


def inputs_of(
    tokens: int,
    *,
    width: int = 3,
    batch: int = 2,
    heads: int = 3,
    modes: int = 4,
    sequences: int | None = None,
    skip: bool = True,
    state: bool = True,
) -> dict[str, Tensor]:
    """Tensor arguments of `lti_attention` by name, float64; modes decay by at most a factor of 0.7 a token."""
    made = {name: torch.randn(batch, tokens, heads, width) for name in "qkv"}
    made["log_a"] = torch.stack([-0.35 * torch.rand(heads, modes) - 0.001, 3.0 * torch.randn(heads, modes)], -1)
    made["c"] = torch.randn(heads, modes, 2)
    if skip:
        made["D"] = torch.randn(heads)
    if state:
        made["initial_state"] = torch.randn(sequences or batch, heads, modes, 2, width, width)
    return {name: value.double() for name, value in made.items()}


def run(
    given: dict[str, Tensor], backend: str, dtype: torch.dtype = torch.float64, **options: object
) -> dict[str, Tensor]:
    """y, final state and every gradient of a fixed loss, by name; half precision is for q, k and v alone."""
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        name: value.to(dtype if name in "qkv" else inner, copy=True).requires_grad_() for name, value in given.items()
    }
    y, final = lti_attention(**leaves, backend=backend, **options)
    seeded = torch.Generator().manual_seed(7)
    dy, dfinal = (torch.randn(part.shape, generator=seeded).bfloat16().to(part.dtype) for part in (y, final))
    found = torch.autograd.grad(
        (y, final), list(leaves.values()), (dy, dfinal), allow_unused=True, materialize_grads=True
    )
    return {"y": y, "final_state": final} | {f"grad.{name}": g for name, g in zip(leaves, found, strict=True)}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], limit: float = 1e-12) -> None:
    for name, exact in other.items():
        assert one[name].shape == exact.shape, name
        error = rms(one[name] - exact) / max(rms(exact), 1e-3)
        assert error <= limit, f"{name}: {error:.2e}"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_definition_is_the_recurrence(width: int) -> None:
    given = inputs_of(9, width=width)
    abar, c = (torch.view_as_complex(given[name]) for name in ("log_a", "c"))
    state = torch.view_as_complex(given["initial_state"].movedim(3, -1).contiguous())  # [B,H,M,P,P]
    outputs = []
    for t in range(9):
        q, k, v = (given[name][:, t] for name in "qkv")
        pair = k.unsqueeze(-1) * v.unsqueeze(-2)
        state = abar.exp()[..., None, None] * state + pair.unsqueeze(2)
        read = 2 * (c[..., None, None] * state).sum(2).real + given["D"][:, None, None] * pair
        outputs.append((q.unsqueeze(-2) @ read).squeeze(-2))
    y, final = lti_attention(**given, backend="reference")
    torch.testing.assert_close(y, torch.stack(outputs, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, torch.view_as_real(state).movedim(-1, 3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_length_meets_the_definition(width: int, tokens: int, backend: str) -> None:
    for state, skip in ((True, True), (False, False)):
        given = inputs_of(tokens, width=width, state=state, skip=skip)
        assert_same(run(given, backend), run(given, "reference"))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_packed_sequences_are_those_run_one_by_one(width: int, state: bool, backend: str) -> None:
    given = inputs_of(PACKED[-1], width=width, batch=1, sequences=len(PACKED) - 1, state=state)
    packed = run(given, backend, cu_seqlens=torch.tensor(PACKED, dtype=torch.int32))
    assert_same(packed, run(given, "reference", cu_seqlens=torch.tensor(PACKED)))
    parts = []
    for s, (start, end) in enumerate(itertools.pairwise(PACKED)):
        row = {name: value[:, start:end] if name in "qkv" else value for name, value in given.items()}
        if state:
            row["initial_state"] = given["initial_state"][s : s + 1]
        parts.append(lti_attention(**row, backend=backend))
    torch.testing.assert_close(packed["y"], torch.cat([y for y, _ in parts], 1), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(packed["final_state"], torch.cat([s for _, s in parts]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
def test_pieces_that_pass_their_state_on_are_the_whole(width: int) -> None:
    given = inputs_of(150, width=width)
    whole, last = lti_attention(**given, backend="chunked")
    outputs, state = [], given["initial_state"]
    for piece in torch.arange(150).split([1, 64, 0, 70, 1, 14]):
        part = {name: value[:, piece] if name in "qkv" else value for name, value in given.items()}
        y, state = lti_attention(**part | {"initial_state": state}, backend="chunked")
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_low_precision_stays_within_its_budget(width: int, dtype: torch.dtype) -> None:
    given = inputs_of(200, width=width)
    given = {name: value.to(dtype if name in "qkv" else torch.float32).double() for name, value in given.items()}
    exact, plain, fft = (run(given, *how) for how in (["reference"], ["chunked", dtype], ["fft", dtype]))
    assert plain["y"].dtype == dtype
    assert plain["final_state"].dtype == torch.float32
    for name, value in plain.items():
        assert relative_rms(value, exact[name]) < (5e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps), name
        verdict = judge(fft[name], exact[name], value, dtype)
        assert verdict.ok, f"{name}: {verdict}"


def test_slow_modes_keep_their_phase_over_16384_tokens() -> None:
    given = inputs_of(16384, width=2, batch=1, heads=1, modes=3, state=False)
    given["log_a"] = torch.tensor([[[-1e-5, 2.9], [-5e-5, 0.7], [-1e-3, 0.01]]]).double()
    half = {name: value.float() if name in "qkv" else value for name, value in given.items()}
    exact = {name: value.double() for name, value in half.items()}
    for backend in FAST:
        y, final = lti_attention(**half, backend=backend)
        wide_y, wide_final = lti_attention(**exact, backend="chunked")
        assert relative_rms(y, wide_y) < 1e-5
        assert relative_rms(final, wide_final) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_wide_heads_have_longer_chunks(packed: bool) -> None:
    """A state of N P^2 numbers for every 64 tokens would be larger than all of them together."""
    ends = [0, 0, 140, 400] if packed else None
    given = inputs_of(400, width=16, modes=8, heads=2, batch=1, sequences=3 if packed else 1)
    assert plain_chunk(8, 16, 400) == 128
    options = {"cu_seqlens": torch.tensor(ends) if packed else None}
    assert_same(run(given, "chunked", **options), run(given, "reference", **options))


@pytest.mark.parametrize("width", [1, 2])
def test_slow_modes_do_not_drift_over_thousands_of_steps(width: int) -> None:
    """Token by token in float32: a factor near 1, rounded, would add its error up in every step."""
    log_a = torch.tensor([[[-1e-4, 3e-4], [-1e-5, 0.0]]], dtype=torch.float64)
    c = torch.ones(1, 2, 2, dtype=torch.float64)
    q, k, v = (1.0 + 0.1 * torch.randn(1, 4000, 1, width) for _ in range(3))
    state = torch.zeros(1, 1, 2, 2, width, width)
    for t in range(k.shape[1]):
        now = slice(t, t + 1)
        _, state = lti_attention(q[:, now], k[:, now], v[:, now], log_a, c, initial_state=state)
    _, exact = lti_attention(q.double(), k.double(), v.double(), log_a, c, backend="chunked")
    assert rms(state - exact) / rms(exact) < 2e-6


@pytest.mark.parametrize("width", WIDTHS)
def test_chunks_are_exactly_causal(width: int) -> None:
    given = inputs_of(150, width=width)
    y, _ = lti_attention(**given, backend="chunked")
    for t in (1, 63, 64, 140):
        later = {name: value.clone() for name, value in given.items()}
        for name in "qkv":
            later[name][:, t:] = 1e3 * torch.randn_like(later[name][:, t:])
        assert torch.equal(lti_attention(**later, backend="chunked")[0][:, :t], y[:, :t])


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_mask_of_ones_makes_it_linear_attention(backend: str) -> None:
    given = inputs_of(130, width=4, modes=1, skip=False)
    given["log_a"] = torch.zeros_like(given["log_a"])  # K_l = 2 Re c = 1
    given["c"] = torch.tensor([0.5, 0.0]).double().expand(3, 1, 2)
    y, final = lti_attention(**given, backend=backend)
    start = given["initial_state"][:, :, 0, 0]
    wanted, sums = linear_attention(*(given[name] for name in "qkv"), initial_state=start)
    torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(final[:, :, 0, 0], sums, rtol=1e-11, atol=1e-11)


def modes_of(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """log_a and c whose kernel is the given one [H,L] for L lags: the modes of its discrete Fourier transform."""
    heads, length = kernel.shape
    spectrum = torch.fft.rfft(kernel) / length  # of n = 0 .. L/2, the others are conjugates
    ends = torch.ones(length // 2 + 1).double()
    ends[0] = ends[-1] = 0.5
    turn = 2 * math.pi / length * torch.arange(length // 2 + 1).double()
    log_a = torch.stack([torch.zeros_like(turn), turn], -1).expand(heads, -1, -1)
    return log_a, torch.view_as_real(spectrum * ends)


@pytest.mark.parametrize("backend", ["reference", *FAST, "kernel"])
@pytest.mark.parametrize("name", ["h3_op", "h3_op_head4"])
def test_the_recorded_operator_comes_back(name: str, backend: str) -> None:
    case = load_case(name)
    width = case.config["head_dim"]
    named = ("q", "k", "v", "ssm_kernel", "D")
    leaves = {part: case.tensors[f"in.{part}"].clone().requires_grad_() for part in named}
    q, k, v = (leaves[part].transpose(1, 2).unflatten(2, (-1, width)) for part in "qkv")
    if backend == "kernel":
        y = convolved(q, k, v, leaves["ssm_kernel"], leaves["D"], None)
    else:
        log_a, c = modes_of(leaves["ssm_kernel"])
        y, _ = lti_attention(q, k, v, log_a, c, D=leaves["D"], backend=backend)
    y = y.flatten(2).transpose(1, 2)
    assert relative_rms(y, case.tensors["y"]) < 1e-10
    for part, gradient in zip(named, torch.autograd.grad((y * case.tensors["w"]).sum(), list(leaves.values()))):
        assert relative_rms(gradient, case.tensors[f"grad.{part}"]) < 1e-10, part


@pytest.mark.parametrize(("width", "packed"), [(1, False), (3, True)])
def test_calls_compile_whole(width: int, packed: bool) -> None:
    given = inputs_of(70, width=width, batch=1 if packed else 2, sequences=2 if packed else None)
    options = {"cu_seqlens": torch.tensor([0, 5, 70])} if packed else {}
    leaves = [value.requires_grad_() for value in given.values()]

    def call(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return lti_attention(**dict(zip(given, parts)), **options)

    torch._dynamo.reset()
    results = []
    for fn in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        y, state = fn(*leaves)
        results.append(dict(enumerate([y, state, *torch.autograd.grad(y.square().sum() + state.sum(), leaves)])))
    assert_same(results[1], results[0], 1e-13)  # type: ignore[arg-type]


def test_the_definition_differentiates_twice() -> None:
    given = {name: value.requires_grad_() for name, value in inputs_of(4, width=2, batch=1, heads=1, modes=2).items()}
    options = {"fast_mode": True, "atol": 1e-5}
    call = lambda *parts: lti_attention(**dict(zip(given, parts)), backend="reference")
    assert torch.autograd.gradcheck(call, tuple(given.values()), **options)
    assert torch.autograd.gradgradcheck(call, tuple(given.values()), **options)


@pytest.mark.parametrize("backend", FAST)
def test_inputs_need_not_be_contiguous(backend: str) -> None:
    given = inputs_of(70)
    turned = {name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in given.items()}
    assert_same(run(turned, backend), run(given, backend))


def test_autocast_does_not_reach_the_sums() -> None:
    given = {name: value.float() for name, value in inputs_of(70).items()}
    outside = lti_attention(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = lti_attention(**given)
    assert torch.equal(inside[0], outside[0])
    assert torch.equal(inside[1], outside[1])


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_tokens_leave_the_state_as_it_was(backend: str) -> None:
    given = inputs_of(0)
    y, final = lti_attention(**given, backend=backend)
    assert y.shape == (2, 0, 3, 3)
    assert torch.equal(final, given["initial_state"])
    assert not lti_attention(**inputs_of(0, state=False), backend=backend)[1].any()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_rows_are_served(backend: str) -> None:
    y, final = lti_attention(**inputs_of(5, batch=0, state=False), backend=backend)
    assert y.shape == (0, 5, 3, 3)
    assert final.shape == (0, 3, 4, 2, 3, 3)


def test_the_choice_is_recorded() -> None:
    with record_dispatch() as record:
        lti_attention(**inputs_of(3))
        lti_attention(**inputs_of(3, width=1))
    assert [(entry.op, entry.backend) for entry in record] == [
        ("lti_attention", "chunked"),
        ("lti_attention", "chunked"),
        ("lti_scan", "chunked"),
    ]
    assert "float64" in record[0].reasons["triton"] or "cpu" in record[0].reasons["triton"]


@pytest.mark.parametrize(("tokens", "width"), [(128, 4), (64, 4), (1, 4), (128, 1), (128, 12)])
def test_flops_are_those_that_torch_counts(tokens: int, width: int) -> None:
    given = inputs_of(tokens, width=width, state=False)
    with FlopCounterMode(display=False) as counter:
        lti_attention(**given, backend="chunked")
    assert counter.get_total_flops() == pytest.approx(flops(2, tokens, 3, width, 4), rel=0.1)


def test_bad_inputs_are_refused_in_words() -> None:
    given = inputs_of(6)
    for name, value, said in (
        ("k", given["k"][:, :5], r"k has shape \[2, 5, 3, 3\], wanted \[B=2, T=6, H=3, P=3\]"),
        ("log_a", given["log_a"][:2], r"log_a has shape \[2, 4, 2\], wanted \[H=3, M, 2\]"),
        ("c", given["c"][:, :3], r"c has shape \[3, 3, 2\], wanted \[H=3, M=4, 2\]"),
        ("D", given["D"][:2], r"D has shape \[2\], wanted \[H=3\]"),
        ("initial_state", given["initial_state"][..., :2], r"wanted \[S=2, H=3, M=4, 2, 3, 3\]"),
    ):
        with pytest.raises(ShapeError, match=said):
            lti_attention(**given | {name: value})
    with pytest.raises(ShapeError, match="H, P and M must be at least 1"):
        lti_attention(*(given[name] for name in "qkv"), given["log_a"][:, :0], given["c"][:, :0])
    with pytest.raises(DtypeError, match=r"k is torch\.float32"):
        lti_attention(**given | {"k": given["k"].float()})
    with pytest.raises(DtypeError, match=r"c is torch\.int64"):
        lti_attention(**given | {"c": given["c"].long()})
    with pytest.raises(PackingError, match="has batch 2"):
        lti_attention(**given, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(BackendError, match="did you mean chunked"):
        lti_attention(**given, backend="chunkd")
    with pytest.raises(BackendError, match="triton: "):
        lti_attention(**given, backend="triton")

"""LTI attention by the Triton kernels against the definition, judged by the error of the plain path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.lti_attention import kernel_flops, lti_attention
from zoo.ops.lti_attention.cost import kernel_chunk
from zoo.ops.lti_attention.gates import gate

from sequence_mixer.conformance.budget import judge
from sequence_mixer.errors import BackendError

pytest.importorskip("triton")

from zoo.ops.lti_attention.kernels.launch import diagonal_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ENDS = [0, 0, 3, 3, 70, 71]


def inputs(
    device: str,
    tokens: int,
    *,
    width: int = 4,
    modes: int = 3,
    batch: int = 2,
    heads: int = 2,
    sequences: int | None = None,
    skip: bool = True,
    state: bool = True,
) -> dict[str, Tensor]:
    """Tensor arguments of `lti_attention` by name, float32; q, k and v are exact in bfloat16."""
    made = {name: torch.randn(batch, tokens, heads, width).bfloat16().float() for name in "qkv"}
    made["log_a"] = torch.stack([-0.3 * torch.rand(heads, modes) - 0.001, 3.0 * torch.randn(heads, modes)], -1)
    made["c"] = torch.randn(heads, modes, 2)
    if skip:
        made["D"] = torch.randn(heads)
    if state:
        made["initial_state"] = torch.randn(sequences or batch, heads, modes, 2, width, width)
    return {name: value.to(device) for name, value in made.items()}


def run(given: dict[str, Tensor], backend: str, **options: object) -> dict[str, Tensor]:
    """y, final state and every gradient for fixed cotangents."""
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    y, final = lti_attention(**leaves, backend=backend, **options)
    seeded = torch.Generator().manual_seed(5)
    dy, dfinal = (torch.randn(part.shape, generator=seeded).bfloat16().to(part) for part in (y, final))
    found = torch.autograd.grad(
        (y, final), list(leaves.values()), (dy, dfinal), allow_unused=True, materialize_grads=True
    )
    return {"y": y.detach(), "final_state": final.detach()} | dict(zip(leaves, found, strict=True))


def check(given: dict[str, Tensor], dtype: torch.dtype, exact_by: str = "reference", **options: object) -> None:
    given = {name: value.to(dtype) if name in "qkv" else value for name, value in given.items()}
    exact = run({name: value.double() for name, value in given.items()}, exact_by, **options)
    plain = run(given, "chunked", **options)
    for name, value in run(given, "triton", **options).items():
        assert value.dtype == plain[name].dtype, name
        assert value.shape == plain[name].shape, name
        verdict = judge(value, exact[name], plain[name], dtype)
        assert verdict.ok, f"{name} {dtype}: {verdict}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_chunks_stay_within_budget(dtype: torch.dtype, device: str) -> None:
    check(inputs(device, 130, batch=1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_stay_within_budget(dtype: torch.dtype, device: str) -> None:
    given = inputs(device, ENDS[-1], batch=1, heads=1, sequences=len(ENDS) - 1)
    check(given, dtype, cu_seqlens=torch.tensor(ENDS, dtype=torch.int32, device=device))


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1},
        {"tokens": 33, "width": 16, "modes": 4, "state": False},
        {"tokens": 64, "width": 3, "modes": 9, "batch": 1, "skip": False},
        {"tokens": 65, "width": 20, "modes": 2, "batch": 1, "heads": 1},
        {"tokens": 37, "width": 1},
    ],
    ids=str,
)
def test_every_width_stays_within_budget(sizes: dict[str, int], device: str) -> None:
    check(inputs(device, **sizes), torch.float32)  # type: ignore[arg-type]


def test_packed_sequences_need_no_states(device: str) -> None:
    given = inputs(device, 40, batch=1, heads=1, state=False)
    check(given, torch.float32, cu_seqlens=torch.tensor([0, 40, 40], device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "modes"), [(1, 32), (2, 8), (4, 32), (16, 32), (64, 8), (128, 2)])
def test_long_inputs_stay_within_budget_on_a_gpu(width: int, modes: int, dtype: torch.dtype, device: str) -> None:
    if device != "cuda":
        pytest.skip("lengths above 130 take too long in the interpreter; this needs a CUDA device")
    ends = torch.tensor([0, 3, 700, 700, 2500, 3001], device=device)
    check(inputs(device, 3001, width=width, modes=modes), dtype, exact_by="chunked")
    given = inputs(device, 3001, width=width, modes=modes, batch=1, sequences=5)
    check(given, dtype, exact_by="chunked", cu_seqlens=ends)
    check(inputs(device, 3001, width=width, modes=modes, state=False), dtype, exact_by="chunked")


def test_slices_of_a_projection_and_expanded_cotangents_are_served(device: str) -> None:
    whole = torch.randn(2, 33, 3, 2, 4, device=device)
    modes = {name: value for name, value in inputs(device, 1).items() if name in ("log_a", "c", "D")}
    found = []
    for backend in ("triton", "chunked"):
        leaf = whole.clone().requires_grad_()
        y, final = lti_attention(*leaf.unbind(2), **modes, backend=backend)
        found.append([y, final, *torch.autograd.grad(y.sum() + final.sum(), leaf)])
    for value, exact in zip(*found, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


def test_scratch_is_never_read_and_results_repeat(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(device, ENDS[-1], batch=1, heads=1, sequences=len(ENDS) - 1)
    ends = torch.tensor(ENDS, device=device)
    clean = run(given, "triton", cu_seqlens=ends)
    empty = torch.empty

    def nan_filled(*args: object, **options: object) -> Tensor:
        made = empty(*args, **options)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", nan_filled)
    for name, value in run(given, "triton", cu_seqlens=ends).items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("packed", [False, True])
def test_the_kernels_compile_whole(packed: bool, device: str) -> None:
    given = inputs(device, 20, batch=1, heads=1, sequences=2 if packed else None)
    options = {"cu_seqlens": torch.tensor([0, 5, 20], device=device)} if packed else {}

    def call(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return lti_attention(**dict(zip(given, parts)), backend="triton", **options)

    torch._dynamo.reset()
    outcomes = []
    for fn in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = [value.clone().requires_grad_() for value in given.values()]
        y, final = fn(*leaves)
        outcomes.append([y, final, *torch.autograd.grad(y.square().sum() + final.sum(), leaves)])
    for value, exact in zip(outcomes[1], outcomes[0], strict=True):
        torch.testing.assert_close(value, exact)


def test_the_operators_pass_opcheck(device: str) -> None:
    from zoo.ops.lti_attention.triton_path import lti_attention_forward, tables

    given = inputs(device, 20, batch=1, heads=1)
    made = tables(given["log_a"], given["c"], given["D"], 64)
    parts = [given[name].requires_grad_() for name in "qkv"]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(lti_attention_forward, (*parts, *made, given["initial_state"], None), test_utils=checks)


def test_diagonals_are_summed_by_their_lag() -> None:
    pairs = torch.randn(2, 3, 4, 4)
    wanted = torch.zeros(2, 12)
    for block in range(3):
        for i in range(4):
            for j in range(4):
                if (lag := 4 * block + i - j) >= 0:
                    wanted[:, lag] += pairs[:, block, i, j]
    torch.testing.assert_close(diagonal_sums(pairs).flatten(1), wanted)


def test_chunks_balance_the_state_they_leave() -> None:
    assert kernel_chunk(32, 16, 4096) == 512
    assert kernel_chunk(32, 64, 100000) == 1024
    assert kernel_chunk(2, 2, 4096) == 64
    assert kernel_chunk(32, 16, 100) == 128


def test_the_flop_counter_sees_the_kernels(device: str) -> None:
    given = {name: value.requires_grad_() for name, value in inputs(device, 20, batch=1).items()}
    with FlopCounterMode(display=False) as counter:
        y, _ = lti_attention(**given, backend="triton")
    assert counter.get_total_flops() == kernel_flops(1, 20, 2, 4, 3)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() > kernel_flops(1, 20, 2, 4, 3)


def test_an_empty_input_is_served(device: str) -> None:
    given = inputs(device, 0)
    y, final = lti_attention(**given, backend="triton")
    assert y.shape == (2, 0, 2, 4)
    assert torch.equal(final, given["initial_state"])


def test_what_the_kernels_do_not_serve_is_refused_in_words(device: str) -> None:
    given = inputs(device, 5)
    with pytest.raises(BackendError, match="takes float32, bfloat16, float16"):
        lti_attention(**{name: value.double() for name, value in given.items()}, backend="triton")
    with pytest.raises(BackendError, match="at most 128 channels, wanted P=129"):
        lti_attention(**inputs(device, 5, width=129, batch=1, heads=1), backend="triton")
    with pytest.raises(BackendError, match="at most 128 modes"):
        lti_attention(**inputs(device, 5, width=1, modes=129), backend="triton")
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    y, _ = lti_attention(**leaves, backend="triton")
    (dq,) = torch.autograd.grad(y.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference' for double backward"):
        dq.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_read_slices_and_give_both_gradients(dtype: torch.dtype, device: str) -> None:
    projected = torch.randn(2, 5, 3 * 40, device=device).to(dtype)
    a, b = (part.detach().requires_grad_() for part in projected.chunk(3, dim=-1)[1:])
    g = torch.randn(2, 40, 5, device=device).to(dtype).transpose(1, 2)
    y = gate(a, b)
    found = (y, *torch.autograd.grad(y, (a, b), g))
    for got, wanted in zip(found, (a * b, g * b, g * a), strict=True):
        if device == "cpu" and dtype == torch.bfloat16:  # the interpreter drops digits instead of rounding
            torch.testing.assert_close(got, wanted, rtol=2.0**-7, atol=0.0)
        else:
            assert torch.equal(got, wanted)
    torch.library.opcheck(gate, (a, b))

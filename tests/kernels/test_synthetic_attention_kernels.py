"""The Triton kernels of synthetic attention against the definition, judged by the error of the plain path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.synthetic_attention import flops, synthetic_attention

from sequence_mixer.conformance.budget import judge
from sequence_mixer.errors import BackendError

pytest.importorskip("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTS: dict[str, tuple[str, ...]] = {
    "inner": ("q", "k"),
    "table": ("table",),
    "outer": ("left", "right"),
    "inner-table": ("q", "k", "table"),
    "all": ("q", "k", "table", "left", "right"),
}
ENDS = torch.tensor([0, 0, 5, 6, 6, 42, 43])
FEW, MANY = torch.tensor([0, 1, 1, 5, 9]), torch.tensor([0, 25, 27, 35, 60])


def draw(
    queries: int,
    keys: int,
    parts: str,
    *,
    batch: int = 2,
    heads: int = 2,
    width: int = 16,
    inner: int = 12,
    longest: int | None = None,
) -> dict[str, Tensor]:
    """longest: positions that the table has, those that occur by default."""
    rows = longest or max(queries, keys)
    side = int(rows**0.5) + 1
    made = {
        "v": torch.randn(batch, keys, heads, width),
        "q": 0.5 * torch.randn(batch, queries, heads, inner),
        "k": 0.5 * torch.randn(batch, keys, heads, inner),
        "left": torch.randn(batch, queries, heads, side),
        "right": torch.randn(batch, queries, heads, side + 1),
        "table": torch.randn(heads, rows, longest or keys),
    }
    return {name: made[name] for name in ("v", *PARTS[parts])}


def run(backend: str, tensors: dict[str, Tensor], cotangent: Tensor, **options: Any) -> list[Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = synthetic_attention(**leaves, queries=cotangent.shape[1], backend=backend, **options)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), cotangent.to(y.dtype))]


def typed(tensors: dict[str, Tensor], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The table stays float32."""
    return {name: t.to(device, torch.float32 if name == "table" else dtype) for name, t in tensors.items()}


def check(tensors: dict[str, Tensor], queries: int, device: str, dtype: torch.dtype, **options: Any) -> None:
    options = {key: x.to(device) if torch.is_tensor(x) else x for key, x in options.items()}
    tensors = typed(tensors, device, dtype)
    batch, _, heads, width = tensors["v"].shape
    cotangent = torch.randn(batch, queries, heads, width).to(device, dtype)
    exact = run("reference", {name: t.double() for name, t in tensors.items()}, cotangent, **options)
    plain = run("chunked", tensors, cotangent, **options)
    ours = run("triton", tensors, cotangent, **options)
    for name, value, wanted, yardstick in zip(("y", *tensors), ours, exact, plain, strict=True):
        verdict = judge(value, wanted, yardstick, dtype)
        assert value.dtype == yardstick.dtype
        assert verdict.ok, f"{name} {dtype}: {verdict}"


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one-token": ({"queries": 1, "keys": 1, "parts": "all"}, {}),
    "inner": ({"queries": 33, "keys": 33, "parts": "inner", "batch": 1, "heads": 1}, {}),
    "table": ({"queries": 65, "keys": 65, "parts": "table", "heads": 1}, {}),
    "outer": ({"queries": 65, "keys": 65, "parts": "outer", "batch": 1, "heads": 1}, {}),
    "all": ({"queries": 33, "keys": 33, "parts": "all", "width": 20, "heads": 1}, {}),
    "full": ({"queries": 33, "keys": 33, "parts": "inner-table", "batch": 1}, {"causal": False}),
    "more-keys": ({"queries": 7, "keys": 50, "parts": "all", "batch": 1, "heads": 1}, {}),
    "more-queries": ({"queries": 50, "keys": 7, "parts": "all", "batch": 1, "heads": 1}, {}),
    "ragged": ({"queries": 2, "keys": 40, "parts": "all", "batch": 3}, {"past": torch.tensor([0, 4, 37])}),
    "packed": (
        {"queries": 43, "keys": 43, "parts": "all", "batch": 1, "heads": 1, "longest": 36},
        {"cu_seqlens": ENDS},
    ),
    "packed-cross": (
        {"queries": 9, "keys": 60, "parts": "all", "batch": 1, "longest": 25},
        {"cu_seqlens": FEW, "cu_seqlens_k": MANY},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_stay_within_budget(name: str, device: str):
    sizes, options = CASES[name]
    in_half = name in ("all", "packed-cross")  # the interpreter is slow, and half precision changes products alone
    for dtype in DTYPES if device == "cuda" else DTYPES[: 1 + in_half]:
        check(draw(**sizes), sizes["queries"], device, dtype, **options)


def test_an_error_that_all_weights_of_a_query_have_in_common_leaves_gradients_alone(device: str):
    from zoo.ops.softmax_attention.triton_path import batch_spans

    given = typed(draw(40, 40, "all", batch=1, heads=1), device, torch.float32)
    tensors = tuple(given.get(name) for name in ("v", "q", "k", "table", "left", "right"))
    spans = batch_spans(1, 40, 40, None, tensors[0].device)
    y, lse = torch.ops.zoo.synthetic_attention_fwd(*tensors, spans, 40, True, False)
    dy = torch.randn_like(y)
    wanted = torch.ops.zoo.synthetic_attention_bwd(dy, *tensors, y, lse, spans, True, False, True)
    off = lse + 1e-3 * torch.randn_like(lse)
    for value, expected in zip(
        torch.ops.zoo.synthetic_attention_bwd(dy, *tensors, y, off, spans, True, False, True), wanted, strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_of_half_precision_are_given_whole_widths(dtype: torch.dtype):
    from zoo.ops.synthetic_attention.kernels.operands import operands

    given = typed(draw(33, 33, "all", width=20), "cpu", dtype)
    sizes = operands(*(given[name] for name in ("v", "q", "k", "table", "left", "right"))).sizes()
    assert (sizes["P"], sizes["N"], sizes["A"], sizes["C"], sizes["COLUMNS"]) == (32, 16, 16, 16, 7)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("width", [64, 128])
def test_long_inputs_stay_within_budget_on_a_gpu(width: int, parts: str, device: str):
    if device != "cuda":
        pytest.skip("lengths above 130 take too long in the interpreter; this needs a CUDA device")
    for dtype in DTYPES:
        check(draw(1000, 1000, parts, width=width), 1000, device, dtype)
        check(draw(600, 600, parts, width=width), 600, device, dtype, causal=False)
        ends = torch.tensor([0, 3, 700, 700, 1000])
        check(draw(1000, 1000, parts, batch=1, width=width, longest=700), 1000, device, dtype, cu_seqlens=ends)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("width", [16, 32])
def test_narrow_parts_stay_within_budget_on_a_gpu(width: int, parts: str, device: str):
    if device != "cuda":
        pytest.skip("lengths above 130 take too long in the interpreter; this needs a CUDA device")
    for dtype in DTYPES:
        check(draw(500, 500, parts, width=width, inner=32), 500, device, dtype)
        check(draw(200, 200, parts, width=width, inner=64, batch=1), 200, device, dtype, causal=False)


def test_programs_share_narrow_parts_among_eight_warps():
    from zoo.ops.synthetic_attention.kernels.operands import operands

    for parts, width, inner, warps in (
        ("outer", 64, 12, 8),
        ("inner", 64, 12, 4),
        ("inner", 64, 32, 8),
        ("inner", 20, 64, 8),
        ("table", 16, 12, 4),
        ("table", 128, 12, 8),
    ):
        given = typed(draw(9, 9, parts, width=width, inner=inner), "cpu", torch.bfloat16)
        made = operands(*(given.get(name) for name in ("v", "q", "k", "table", "left", "right")))
        assert made.blocks() == (64, warps), (parts, width, inner)


def test_operands_of_any_stride_are_served(device: str):
    tensors = typed(draw(20, 20, "all"), device, torch.float32)
    cotangent = torch.randn(2, 1, 2, 1, device=device).expand(2, 20, 2, 16)
    wanted = run("triton", tensors, cotangent)
    moved = {name: t.mT.contiguous().mT for name, t in tensors.items()}
    wide = torch.randn(2, 30, 40, device=device)
    wide[:, :20, 9:29] = tensors["table"]
    for changed in (moved, {"table": wide[:, :20, 9:29]}):
        for value, expected in zip(run("triton", tensors | changed, cotangent), wanted, strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_keys_that_a_batch_shares_are_served_without_a_copy(device: str):
    tensors = typed(draw(20, 20, "inner"), device, torch.float32)
    shared = tensors["k"][:1, :, :1].detach()
    cotangent = torch.randn(2, 20, 2, 16, device=device)
    found = []
    for backend in ("triton", "chunked"):
        leaf = shared.clone().requires_grad_()
        y = synthetic_attention(tensors["v"], q=tensors["q"], k=leaf.expand(2, 20, 2, 12), backend=backend)
        found.append([y.detach(), *torch.autograd.grad(y, leaf, cotangent)])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected)


def test_fresh_memory_is_never_read_and_results_repeat(device: str, monkeypatch: pytest.MonkeyPatch):
    cotangent = torch.randn(1, 19, 1, 16, device=device)
    options = {"cu_seqlens": torch.tensor([0, 0, 5, 6, 18, 19], device=device)}
    for dtype in (torch.float32, torch.bfloat16):
        tensors = typed(draw(19, 19, "all", batch=1, heads=1), device, dtype)
        clean = run("triton", tensors, cotangent, **options)
        empty, empty_like = torch.empty, torch.empty_like
        with monkeypatch.context() as patch:
            for name, make in (("empty", empty), ("empty_like", empty_like)):
                nan = lambda *sizes, make=make, **rest: (
                    made.fill_(torch.nan) if (made := make(*sizes, **rest)).is_floating_point() else made
                )
                patch.setattr(torch, name, nan)
            for value, wanted in zip(run("triton", tensors, cotangent, **options), clean, strict=True):
                torch.testing.assert_close(value, wanted, rtol=0, atol=0)


def test_custom_operators_pass_opcheck(device: str):
    from zoo.ops.softmax_attention.triton_path import batch_spans

    for parts in ("all", "table"):
        given = typed(draw(9, 9, parts, batch=1, heads=1), device, torch.float32)
        tensors = tuple(given.get(name) for name in ("v", "q", "k", "table", "left", "right"))
        leaves = tuple(None if t is None else t.requires_grad_() for t in tensors)
        spans = batch_spans(1, 9, 9, None, leaves[0].device)
        forward = torch.ops.zoo.synthetic_attention_fwd
        torch.library.opcheck(forward, (*leaves, spans, 9, True, False))
        with torch.no_grad():
            y, lse = forward(*leaves, spans, 9, True, False)
            plain = tuple(None if t is None else t.detach() for t in leaves)
            arguments = (torch.randn_like(y), *plain, y, lse, spans, True, False)
            torch.library.opcheck(torch.ops.zoo.synthetic_attention_bwd, (*arguments, parts == "all"))


@pytest.mark.parametrize("name", ["packed-cross", "ragged"])
def test_the_kernels_compile_whole(name: str, device: str):
    sizes, options = CASES[name]
    options = {key: x.to(device) if torch.is_tensor(x) else x for key, x in options.items()}
    tensors = {key: t.requires_grad_() for key, t in typed(draw(**sizes), device, torch.float32).items()}
    torch._dynamo.reset()

    def call(**given: Tensor) -> Tensor:
        return synthetic_attention(**given, **options, backend="triton")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    grads = torch.autograd.grad(compiled(**tensors).square().sum(), list(tensors.values()))
    wanted = torch.autograd.grad(call(**tensors).square().sum(), list(tensors.values()))
    for value, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(value, expected)


def test_the_flop_counter_sees_both_directions(device: str):
    tensors = {key: t.requires_grad_() for key, t in typed(draw(20, 20, "inner"), device, torch.float32).items()}
    with FlopCounterMode(display=False) as counter:
        y = synthetic_attention(**tensors, backend="triton")
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == flops(2, 20, 20, 2, 12, 16)
    assert counter.get_total_flops() == forward + flops(2, 20, 20, 2, 3 * 12, 2 * 16)
    tensors = typed(draw(20, 20, "table", batch=1), device, torch.float32)
    with FlopCounterMode(display=False) as counter:
        synthetic_attention(**tensors, cu_seqlens=torch.tensor([0, 5, 20], device=device), backend="triton")
    assert counter.get_total_flops() == flops(1, 5, 5, 2, 0, 16) + flops(1, 15, 15, 2, 0, 16)


def test_what_the_kernels_cannot_do_is_refused_in_words(device: str):
    tensors = {key: t.requires_grad_() for key, t in typed(draw(5, 5, "inner"), device, torch.float32).items()}
    y = synthetic_attention(**tensors, backend="triton")
    (grad,) = torch.autograd.grad(y.sum(), tensors["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(grad.sum(), tensors["q"])
    wide = typed(draw(5, 5, "table", width=300), device, torch.float32)
    with pytest.raises(BackendError, match="up to 256 channels, the widest part here has 300"):
        synthetic_attention(**wide, backend="triton")

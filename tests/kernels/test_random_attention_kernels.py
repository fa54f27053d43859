"""The Triton kernels of random attention against the definition, judged by the error of the plain path."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.random_attention import flops, random_attention

from sequence_mixer.conformance.budget import judge

pytest.importorskip("triton")

DTYPES = {"cuda": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)}


def draw(queries: int, keys: int, *, batch: int = 2, heads: int = 2, width: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(heads, queries, keys), torch.randn(batch, keys, heads, width)


def run(backend: str, tensors: tuple[Tensor, Tensor], cotangent: Tensor, causal: bool = True) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = random_attention(*leaves, causal=causal, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]


def check(tensors: tuple[Tensor, Tensor], device: str, dtype: torch.dtype, causal: bool = True) -> None:
    tensors = (tensors[0].to(device), tensors[1].to(device, dtype))
    cotangent = torch.randn(tensors[1].shape[0], tensors[0].shape[1], *tensors[1].shape[2:]).to(device, dtype)
    exact = run("reference", (tensors[0].double(), tensors[1].double()), cotangent, causal)
    plain = run("chunked", tensors, cotangent, causal)
    ours = run("triton", tensors, cotangent, causal)
    for name, value, wanted, yardstick in zip(("y", "dtable", "dv"), ours, exact, plain, strict=True):
        verdict = judge(value, wanted, yardstick, dtype)
        assert value.dtype == yardstick.dtype
        assert verdict.ok, f"{name} {dtype}: {verdict}"


CASES: dict[str, tuple[dict, bool]] = {
    "one-token": ({"queries": 1, "keys": 1}, True),
    "tile": ({"queries": 64, "keys": 64, "batch": 1, "heads": 1}, True),
    "tile-and-one": ({"queries": 65, "keys": 65, "heads": 1, "width": 24}, True),
    "prime": ({"queries": 127, "keys": 127, "batch": 1, "heads": 1, "width": 64}, True),
    "full": ({"queries": 40, "keys": 41, "batch": 3, "width": 10}, False),
    "one-query": ({"queries": 1, "keys": 70}, True),
    "more-keys": ({"queries": 33, "keys": 50, "width": 8}, True),
    "more-queries": ({"queries": 50, "keys": 33, "width": 20}, True),
    "one-key": ({"queries": 9, "keys": 1, "width": 3}, True),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_stay_within_budget(name: str, device: str):
    sizes, causal = CASES[name]
    for dtype in DTYPES[device]:
        check(draw(**sizes), device, dtype, causal)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("tokens", [1000, 2048])
def test_long_inputs_stay_within_budget_on_a_gpu(tokens: int, width: int, device: str):
    if device != "cuda":
        pytest.skip("lengths above 130 take too long in the interpreter; this needs a CUDA device")
    for dtype in DTYPES[device]:
        for causal in (True, False):
            check(draw(tokens, tokens, batch=4, width=width), device, dtype, causal)
        check(draw(tokens - 300, tokens, width=width), device, dtype)


def test_long_rows_are_read_in_pieces(device: str):
    check(draw(3, 2500, batch=1, heads=1), device, torch.float32)


def test_any_strides_and_dtypes_of_the_table_are_served(device: str):
    table, v = (t.to(device) for t in draw(18, 18))
    cotangent = torch.randn(2, 1, 2, 1, device=device).expand(2, 18, 2, 16)
    exact = run("reference", (table.double(), v.double()), cotangent)
    plain = run("chunked", (table, v), cotangent)
    wide = torch.randn(2, 40, 50, device=device)
    wide[:, 3:21, 7:25] = table
    moved = v.transpose(1, 3).contiguous().transpose(1, 3)
    for tensors in ((wide[:, 3:21, 7:25], moved), (table.mT.contiguous().mT, v)):
        for value, wanted, yardstick in zip(run("triton", tensors, cotangent), exact, plain, strict=True):
            verdict = judge(value, wanted, yardstick, torch.float32)
            assert verdict.ok, verdict
    half = table.bfloat16()
    ours = run("triton", (half, v), cotangent)
    assert ours[1].dtype == torch.bfloat16
    torch.testing.assert_close(ours[0], run("chunked", (half, v), cotangent)[0])


def test_fresh_memory_is_never_read_and_results_repeat(device: str, monkeypatch: pytest.MonkeyPatch):
    tensors = tuple(t.to(device) for t in draw(37, 37))
    cotangent = torch.randn(2, 37, 2, 16, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        given = (tensors[0], tensors[1].to(dtype))
        clean = run("triton", given, cotangent)
        empty = torch.empty
        with monkeypatch.context() as patch:
            patch.setattr(
                torch, "empty", lambda *sizes, empty=empty, **options: empty(*sizes, **options).fill_(torch.nan)
            )
            for value, wanted in zip(run("triton", given, cotangent), clean, strict=True):
                torch.testing.assert_close(value, wanted, rtol=0, atol=0)


def test_only_gradients_that_are_asked_for_are_computed(device: str):
    table, v = (t.to(device) for t in draw(20, 20))
    y = random_attention(table, v.requires_grad_(), backend="triton")
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == flops(2, 20, 20, 2, 16)
    assert table.grad is None
    with FlopCounterMode(display=False) as counter:
        y = random_attention(table.requires_grad_(), v, backend="triton")
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == flops(2, 20, 20, 2, 16)
    assert counter.get_total_flops() == 3 * forward


def test_custom_operators_pass_opcheck(device: str):
    table, v = (t.to(device).requires_grad_() for t in draw(9, 9))
    torch.library.opcheck(torch.ops.zoo.random_attention_fwd, (table, v, True))
    with torch.no_grad():
        y, weights = torch.ops.zoo.random_attention_fwd(table, v, False)
        arguments = (torch.randn_like(y), v.detach(), y, weights, False)
        for asked in ((True, True), (False, True)):
            torch.library.opcheck(torch.ops.zoo.random_attention_bwd, (*arguments, *asked))


def test_the_kernels_compile_whole(device: str):
    torch._dynamo.reset()

    def call(table: Tensor, v: Tensor) -> Tensor:
        return random_attention(table, v, backend="triton")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    leaves = [t.to(device).requires_grad_() for t in draw(17, 17)]
    grads = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    wanted = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    for value, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(value, expected)


def test_second_derivatives_are_refused_in_words(device: str):
    table, v = (t.to(device).requires_grad_() for t in draw(5, 5))
    (grad,) = torch.autograd.grad(random_attention(table, v, backend="triton").sum(), v, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(grad.sum(), table)

"""The fused bias and GELU of the token MLP against the definition, judged by the error of the plain path."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.token_mlp import flops, token_mlp

from sequence_mixer.conformance.budget import judge

pytest.importorskip("triton")

DTYPES = {"cuda": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)}
Tensors = list[Tensor | None]


def draw(
    tokens: int, *, batch: int = 2, channels: int = 24, hidden: int = 9, length: int | None = None, bias: bool = True
) -> Tensors:
    """x, w1, b1, w2, b2."""
    length = length or tokens
    w1, w2 = torch.randn(hidden, length) * length**-0.5, torch.randn(length, hidden) * hidden**-0.5
    b1, b2 = (torch.randn(hidden), torch.randn(length)) if bias else (None, None)
    return [torch.randn(batch, tokens, channels), w1, b1, w2, b2]


def moved(tensors: Tensors, *to) -> Tensors:
    return [None if t is None else t.to(*to) for t in tensors]


def run(backend: str, tensors: Tensors, cotangent: Tensor, **options) -> list[Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = token_mlp(*leaves, backend=backend, **options)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], cotangent.to(y.dtype))]


def check(tensors: Tensors, device: str, dtype: torch.dtype, **options) -> None:
    tensors = moved(tensors, device, dtype)
    assert tensors[0] is not None
    cotangent = torch.randn(tensors[0].shape).to(device, dtype)
    exact = run("reference", moved(tensors, torch.float64), cotangent, **options)
    plain = run("chunked", tensors, cotangent, **options)
    ours = run("triton", tensors, cotangent, **options)
    for place, (value, wanted, yardstick) in enumerate(zip(ours, exact, plain, strict=True)):
        verdict = judge(value, wanted, yardstick, dtype)
        assert value.dtype == dtype
        assert verdict.ok, f"{place} {dtype}: {verdict}"


CASES: dict[str, tuple[dict, dict]] = {
    "one-of-each": ({"tokens": 1, "batch": 1, "channels": 1, "hidden": 1}, {}),
    "block-less-one": ({"tokens": 20, "channels": 511, "hidden": 4}, {}),
    "block": ({"tokens": 20, "channels": 512, "hidden": 5}, {"activation": "gelu_erf"}),
    "block-and-one": ({"tokens": 20, "channels": 513, "hidden": 3, "batch": 1}, {}),
    "longer-weights": ({"tokens": 67, "length": 90, "hidden": 31}, {"activation": "gelu_erf"}),
    "no-biases": ({"tokens": 33, "bias": False}, {}),
    "causal": ({"tokens": 37, "length": 50, "hidden": 50}, {"causal": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_stay_within_budget(name: str, device: str):
    sizes, options = CASES[name]
    for dtype in DTYPES[device]:
        check(draw(**sizes), device, dtype, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf"])
@pytest.mark.parametrize(("tokens", "hidden"), [(1000, 384), (4096, 512)])
def test_long_inputs_stay_within_budget_on_a_gpu(tokens: int, hidden: int, activation: str, device: str):
    if device != "cuda":
        pytest.skip("lengths above 130 take too long in the interpreter; this needs a CUDA device")
    for dtype in DTYPES[device]:
        check(draw(tokens, channels=768, hidden=hidden, batch=4), device, dtype, activation=activation)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf"])
def test_large_arguments_neither_overflow_nor_lose_the_tail(activation: str, device: str):
    x = torch.tensor([-1e4, -50.0, -8.0, -3.0, -1e-20, 0.0, 1e-20, 3.0, 8.0, 50.0, 1e4]).view(1, 1, -1)
    one = torch.ones(1, 1)
    tensors = moved([x, one, torch.zeros(1), one, None], device)
    cotangent = torch.ones_like(x).to(device)
    exact = run("reference", moved(tensors, torch.float64), cotangent, activation=activation)
    for value, wanted in zip(run("triton", tensors, cotangent, activation=activation), exact, strict=True):
        torch.testing.assert_close(value, wanted.float(), rtol=1e-5, atol=1e-6)


def test_any_strides_are_served(device: str):
    tensors = moved(draw(33), device)
    x = tensors[0]
    assert x is not None
    cotangent = torch.randn(2, 1, 24, device=device).expand(2, 33, 24)
    exact = run("reference", moved(tensors, torch.float64), cotangent)
    plain = run("chunked", tensors, cotangent)
    for view in (x.mT.contiguous().mT, torch.cat([x, x], 2)[..., :24], torch.stack([x, x], -1)[..., 0]):
        for value, wanted, yardstick in zip(run("triton", [view, *tensors[1:]], cotangent), exact, plain, strict=True):
            verdict = judge(value, wanted, yardstick, torch.float32)
            assert verdict.ok, verdict


def test_scratch_memory_is_never_read(device: str, monkeypatch: pytest.MonkeyPatch):
    tensors, cotangent = moved(draw(20, channels=520), device), torch.randn(2, 20, 520, device=device)
    clean = run("triton", tensors, cotangent)
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, real=real, **options: real(*args, **options).fill_(torch.nan))
    for value, wanted in zip(run("triton", tensors, cotangent), clean, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize(("bias", "keep"), [(False, True), (True, True), (True, False)])
def test_custom_operators_pass_opcheck(bias: bool, keep: bool, device: str):
    x, w1, b1, w2, b2 = (None if t is None else t.to(device).requires_grad_() for t in draw(10, bias=bias))
    token_mlp(x, w1, b1, w2, b2, backend="triton")  # registers the operators
    torch.library.opcheck(torch.ops.zoo.token_mlp_fwd, (x, w1, b1, w2, b2, True, keep))
    with torch.no_grad():
        y, before = torch.ops.zoo.token_mlp_fwd(x, w1, b1, w2, b2, True, keep)
        given = [None if t is None else t.detach() for t in (torch.randn_like(y), x, w1, b1, w2, before)]
        torch.library.opcheck(torch.ops.zoo.token_mlp_bwd, (*given, True))


@pytest.mark.parametrize("name", ["no-biases", "causal"])
def test_the_kernels_compile_whole(name: str, device: str):
    sizes, options = CASES[name]
    torch._dynamo.reset()

    def call(*given: Tensor | None) -> Tensor:
        return token_mlp(*given, backend="triton", **options)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    leaves = [None if t is None else t.to(device).requires_grad_() for t in draw(**sizes)]
    inputs = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(compiled(*leaves).square().sum(), inputs)
    for value, wanted in zip(grads, torch.autograd.grad(call(*leaves).square().sum(), inputs), strict=True):
        torch.testing.assert_close(value, wanted)


def test_the_flop_counter_sees_both_directions(device: str):
    leaves = [None if t is None else t.to(device).requires_grad_() for t in draw(20)]
    with FlopCounterMode(display=False) as counter:
        y = token_mlp(*leaves, backend="triton")
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == flops(2, 20, 24, 9)
    assert counter.get_total_flops() == 3 * forward


def test_second_derivatives_are_refused_in_words(device: str):
    leaves = [None if t is None else t.to(device).requires_grad_() for t in draw(5)]
    y = token_mlp(*leaves, backend="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(grad.sum(), leaves[0])

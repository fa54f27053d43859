"""The Triton kernels of softmax attention against the definition, judged by the error of the plain path."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.softmax_attention import flops, softmax_attention

from sequence_mixer.conformance.budget import judge
from sequence_mixer.errors import BackendError

pytest.importorskip("triton")

DTYPES = {"cuda": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)}


def draw(
    queries: int, keys: int, *, batch: int = 2, heads: int = 4, groups: int = 2, width: int = 16, values: int = 16
):
    return (
        torch.randn(batch, queries, heads, width),
        torch.randn(batch, keys, groups, width),
        torch.randn(batch, keys, groups, values),
    )


def run(backend: str, tensors: tuple[Tensor, ...], cotangent: Tensor, **options) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = softmax_attention(*leaves, backend=backend, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]


def padding(batch: int, keys: int) -> Tensor:
    mask = torch.ones(batch, keys, dtype=torch.bool)
    mask[0, : keys // 3] = False
    mask[1, keys - keys // 4 :] = False
    mask[2:] = False
    return mask


def check(tensors: tuple[Tensor, ...], device: str, dtype: torch.dtype, **options) -> None:
    options = {key: x.to(device) if torch.is_tensor(x) else x for key, x in options.items()}
    tensors = tuple(t.to(device, dtype) for t in tensors)
    cotangent = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3]).to(device, dtype)
    exact = run("reference", tuple(t.double() for t in tensors), cotangent, **options)
    plain = run("chunked", tensors, cotangent, **options)
    ours = run("triton", tensors, cotangent, **options)
    for name, value, wanted, yardstick in zip(("y", "dq", "dk", "dv"), ours, exact, plain, strict=True):
        verdict = judge(value, wanted, yardstick, dtype)
        assert value.dtype == dtype
        assert verdict.ok, f"{name} {dtype}: {verdict}"


ENDS = torch.tensor([0, 0, 5, 6, 6, 72, 73])
KEY_ENDS = torch.tensor([0, 3, 12, 12, 13, 83, 90])
CASES: dict[str, tuple[dict, dict]] = {
    "one-token": ({"queries": 1, "keys": 1}, {}),
    "tile-less-one": ({"queries": 63, "keys": 63, "batch": 1}, {}),
    "tile": ({"queries": 64, "keys": 64, "batch": 1}, {}),
    "tile-and-one": ({"queries": 65, "keys": 65, "batch": 1}, {}),
    "prime": ({"queries": 127, "keys": 127, "batch": 1, "heads": 2, "groups": 1}, {}),
    "full": ({"queries": 21, "keys": 37, "width": 24, "values": 20}, {"causal": False, "scale": 0.3}),
    "wide": ({"queries": 20, "keys": 20, "batch": 1, "width": 128, "values": 96}, {}),
    "widest": ({"queries": 18, "keys": 18, "batch": 1, "heads": 1, "groups": 1, "width": 200, "values": 256}, {}),
    "one-query": ({"queries": 1, "keys": 70}, {}),
    "more-keys": ({"queries": 9, "keys": 80}, {}),
    "more-queries": ({"queries": 80, "keys": 9}, {}),
    "one-group": ({"queries": 33, "keys": 33, "heads": 6, "groups": 1}, {}),
    "padded": ({"queries": 70, "keys": 70, "batch": 3}, {"padding_mask": padding(3, 70)}),
    "padded-full": ({"queries": 40, "keys": 40, "batch": 3}, {"padding_mask": padding(3, 40), "causal": False}),
    "padded-keys": ({"queries": 7, "keys": 40, "batch": 3}, {"padding_mask": padding(3, 40)}),
    "packed": ({"queries": 73, "keys": 73, "batch": 1}, {"cu_seqlens": ENDS}),
    "packed-full": ({"queries": 73, "keys": 73, "batch": 1}, {"cu_seqlens": ENDS.int(), "causal": False}),
    "packed-cross": ({"queries": 73, "keys": 90, "batch": 1}, {"cu_seqlens": ENDS, "cu_seqlens_k": KEY_ENDS}),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_stay_within_budget(name: str, device: str):
    sizes, options = CASES[name]
    for dtype in DTYPES[device]:
        check(draw(**sizes), device, dtype, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("tokens", [1000, 2048])
def test_long_inputs_stay_within_budget_on_a_gpu(tokens: int, width: int, device: str):
    if device != "cuda":
        pytest.skip("lengths above 130 take too long in the interpreter; this needs a CUDA device")
    for dtype in DTYPES[device]:
        check(draw(tokens, tokens, width=width, values=width), device, dtype)
        ends = torch.tensor([0, 3, 700, 700, tokens])
        check(draw(tokens, tokens, batch=1, width=width, values=width), device, dtype, cu_seqlens=ends)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 32])
def test_narrow_heads_stay_within_budget_on_a_gpu(width: int, device: str):
    if device != "cuda":
        pytest.skip("lengths above 130 take too long in the interpreter; this needs a CUDA device")
    for dtype in DTYPES[device]:
        check(draw(700, 700, width=width, values=width), device, dtype)
        check(draw(300, 500, width=width, values=48 - width), device, dtype, causal=False)


def test_slices_of_a_projection_and_expanded_cotangents_are_served(device: str):
    whole = torch.randn(2, 33, 3, 4, 16, device=device)
    tensors = whole.unbind(2)
    cotangent = torch.randn(2, 1, 4, 1, device=device).expand(2, 33, 4, 16)
    exact = run("reference", tuple(t.double() for t in tensors), cotangent)
    plain = run("chunked", tensors, cotangent)
    for moved in (tensors, tuple(t.transpose(1, 3).contiguous().transpose(1, 3) for t in tensors)):
        for value, wanted, yardstick in zip(run("triton", moved, cotangent), exact, plain, strict=True):
            verdict = judge(value, wanted, yardstick, torch.float32)
            assert verdict.ok, verdict


def test_nan_in_padded_slots_and_scratch_changes_nothing(device: str, monkeypatch: pytest.MonkeyPatch):
    tensors = tuple(t.to(device) for t in draw(40, 40, batch=3))
    mask = padding(3, 40).to(device)
    cotangent = torch.randn(3, 40, 4, 16, device=device)
    clean = run("triton", tensors, cotangent, padding_mask=mask)
    assert bool((clean[0][~mask] == 0).all())
    dirty = tuple(t.masked_fill(~mask[..., None, None], torch.nan) for t in tensors)
    for value, wanted in zip(run("triton", dirty, cotangent, padding_mask=mask), clean, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    plain = run("triton", tensors, cotangent)
    empty = torch.empty

    def nan_filled(*args, **options):
        made = empty(*args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", nan_filled)
    for value, wanted in zip(run("triton", tensors, cotangent), plain, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)


def test_custom_operators_pass_opcheck(device: str):
    from zoo.ops.softmax_attention.triton_path import batch_spans

    q, k, v = (t.to(device).requires_grad_() for t in draw(20, 20, batch=1))
    spans = batch_spans(1, 20, 20, None, q.device)
    forward = torch.ops.zoo.softmax_attention_fwd
    torch.library.opcheck(forward, (q, k, v, spans, 0.25, True, False, False))
    with torch.no_grad():
        y, lse = forward(q, k, v, spans, 0.25, True, False, False)
        arguments = (torch.randn_like(y), q, k, v, y, lse, spans, 0.25, True, False, False)
        torch.library.opcheck(
            torch.ops.zoo.softmax_attention_bwd, tuple(t.detach() if torch.is_tensor(t) else t for t in arguments)
        )


@pytest.mark.parametrize("name", ["tile-and-one", "padded", "packed"])
def test_the_kernels_compile_whole(name: str, device: str):
    sizes, options = CASES[name]
    options = {key: x.to(device) if torch.is_tensor(x) else x for key, x in options.items()}
    torch._dynamo.reset()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k, v, backend="triton", **options)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    leaves = [t.to(device).requires_grad_() for t in draw(**sizes)]
    grads = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    wanted = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    for value, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(value, expected)


def test_the_flop_counter_sees_both_directions(device: str):
    q, k, v = (t.to(device).requires_grad_() for t in draw(20, 20))
    with FlopCounterMode(display=False) as counter:
        y = softmax_attention(q, k, v, backend="triton")
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == flops(2, 20, 20, 4, 16)
    assert counter.get_total_flops() == forward * 7 // 2
    q, k, v = (t.to(device) for t in draw(20, 20, batch=1))
    with FlopCounterMode(display=False) as counter:
        softmax_attention(q, k, v, backend="triton", cu_seqlens=torch.tensor([0, 5, 20], device=device))
    assert counter.get_total_flops() == flops(1, 5, 5, 4, 16) + flops(1, 15, 15, 4, 16)


def test_second_derivatives_and_biases_are_refused_in_words(device: str):
    q, k, v = (t.to(device).requires_grad_() for t in draw(5, 5))
    y = softmax_attention(q, k, v, backend="triton")
    (grad,) = torch.autograd.grad(y.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(grad.sum(), q)
    with pytest.raises(BackendError, match="takes no bias"):
        softmax_attention(q, k, v, bias=torch.zeros(5, 5, device=device), backend="triton")
    with pytest.raises(BackendError, match="256 channels"):
        softmax_attention(*(t.to(device) for t in draw(5, 5, width=300)), backend="triton")

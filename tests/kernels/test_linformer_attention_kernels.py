"""The Triton kernels of Linformer attention against the definition, judged by the error of the plain path."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.linformer_attention import flops, linformer_attention

from sequence_mixer.conformance.budget import judge
from sequence_mixer.errors import BackendError

pytest.importorskip("triton")

DTYPES = {"cuda": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)}
NAMES = ("y", "dq", "dk", "dv", "dE", "dF")


def draw(
    tokens: int, *, batch: int = 2, heads: int = 4, groups: int = 2, width: int = 16, rank: int = 12,
    length: int | None = None, own: bool = False, scale: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """q, k, v, E and F, projected keys and values of order `scale`; F in the strides of a stored transpose."""
    length, own_heads = length or tokens, (groups,) if own else ()
    q, *kv = torch.randn(batch, tokens, heads, width), *torch.randn(2, batch, tokens, groups, width)
    E, F = torch.randn(*own_heads, rank, length), torch.randn(*own_heads, length, rank).mT
    return [q, *kv, E * scale * tokens**-0.5, F * scale * tokens**-0.5]


def run(backend: str, tensors: list[Tensor], cotangent: Tensor, **options) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = linformer_attention(*leaves, backend=backend, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]


def padding(batch: int, tokens: int) -> Tensor:
    """Left padded, right padded, no token."""
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[0, : tokens // 3] = False
    mask[1, tokens - tokens // 4 :] = False
    mask[2:] = False
    return mask


def check(tensors: list[Tensor], device: str, dtype: torch.dtype, **options) -> None:
    options = {key: x.to(device) if torch.is_tensor(x) else x for key, x in options.items()}
    tensors = [t.to(device, dtype) for t in tensors]
    cotangent = torch.randn(tensors[0].shape).to(device, dtype)
    exact = run("reference", [t.double() for t in tensors], cotangent, **options)
    plain = run("chunked", tensors, cotangent, **options)
    ours = run("triton", tensors, cotangent, **options)
    for name, value, wanted, yardstick in zip(NAMES, ours, exact, plain, strict=True):
        verdict = judge(value, wanted, yardstick, dtype)
        assert value.dtype == dtype
        assert verdict.ok, f"{name} {dtype}: {verdict}"


CASES: dict[str, tuple[dict, dict]] = {
    "one-token": ({"tokens": 1, "length": 5, "batch": 16}, {}),  # dE is the sum of few terms else
    "tile": ({"tokens": 64, "batch": 1, "heads": 2, "groups": 1}, {}),
    "tile-and-one": ({"tokens": 65, "batch": 1, "length": 80, "rank": 20, "own": True}, {}),
    "prime": ({"tokens": 127, "batch": 1, "heads": 2, "groups": 1}, {}),
    "many-rows": ({"tokens": 21, "batch": 1, "heads": 1, "groups": 1, "rank": 130}, {}),
    "wide": ({"tokens": 20, "batch": 1, "heads": 2, "groups": 1, "width": 200, "rank": 16}, {}),
    "peaked": ({"tokens": 65, "batch": 1, "length": 80, "rank": 20, "own": True, "scale": 8.0}, {}),
    "peaked-wide": ({"tokens": 20, "batch": 1, "heads": 2, "width": 200, "rank": 16, "scale": 5.0}, {}),
    "padded": ({"tokens": 70, "batch": 3, "heads": 2, "groups": 1}, {"padding_mask": padding(3, 70)}),
    "padded-own": (
        {"tokens": 40, "batch": 3, "heads": 2, "rank": 33, "width": 24, "own": True},
        {"padding_mask": padding(3, 40)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_stay_within_budget(name: str, device: str):
    sizes, options = CASES[name]
    for dtype in DTYPES[device]:
        check(draw(**sizes), device, dtype, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "width"), [(64, 64), (256, 64), (512, 64), (128, 128), (256, 128), (1024, 32)])
@pytest.mark.parametrize("tokens", [1000, 4096])
def test_long_inputs_stay_within_budget_on_a_gpu(tokens: int, rank: int, width: int, device: str):
    if device != "cuda":
        pytest.skip("lengths above 130 take too long in the interpreter; this needs a CUDA device")
    from zoo.ops.linformer_attention import fits_on_chip

    for dtype in DTYPES[device]:
        if fits_on_chip(rank, width, dtype.itemsize):
            check(draw(tokens, width=width, rank=rank, length=4096), device, dtype)


def test_a_split_sum_is_the_whole_sum(device: str, monkeypatch: pytest.MonkeyPatch):
    from zoo.ops.linformer_attention.kernels import backward, project

    tensors = [t.to(device) for t in draw(70, heads=2, groups=1)]
    mask, cotangent = padding(2, 70).to(device), torch.randn(2, 70, 2, 16, device=device)
    whole = [run("triton", tensors, cotangent, **options) for options in ({}, {"padding_mask": mask})]
    for module in (project, backward):
        monkeypatch.setattr(module, "split_length", lambda tokens, programs, block: (-(-tokens // block), block))
    split = [run("triton", tensors, cotangent, **options) for options in ({}, {"padding_mask": mask})]
    for ours, wanted in zip(split, whole, strict=True):
        for name, value, expected in zip(NAMES, ours, wanted, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=lambda told, name=name: name + told)


@pytest.mark.parametrize(("masked", "halves"), [(False, 1), (True, 1), (True, 2)])
def test_queries_shared_among_programs_stay_within_budget(
    masked: bool, halves: int, device: str, monkeypatch: pytest.MonkeyPatch
):
    from zoo.ops.linformer_attention.kernels import tiles

    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(tiles, name, (*getattr(tiles, name)[:4], 1, halves))  # a tile is a walk long enough
    monkeypatch.setattr(tiles, "HELD", 512)  # as much as these keys take
    assert tiles.held_tiles(30, 16, 130, 2, backward=True)[2] < 130
    options = {"padding_mask": padding(2, 130)} if masked else {}
    check(draw(130, heads=2, groups=1, rank=30), device, torch.bfloat16, **options)


def test_sums_are_split_where_few_programs_have_much_to_add():
    from zoo.ops.linformer_attention.kernels.tiles import PROGRAMS, split_length

    assert split_length(8192, 2 * PROGRAMS, 64) == (1, 8192)
    parts, span = split_length(8192, 16, 64)
    assert (parts, span % 64) == (16, 0)
    assert split_length(100, 1, 64) == (1, 128)
    for tokens in (1, 63, 64, 65, 1000, 4097, 100_000):
        for programs in (1, 7, 300):
            parts, span = split_length(tokens, programs, 64)
            assert (parts - 1) * span < tokens <= parts * span


def test_any_strides_are_served(device: str):
    whole = torch.randn(2, 33, 3, 2, 16, device=device)
    q, k, v = whole.unbind(2)
    E, F = (t.to(device) for t in draw(33, heads=2)[3:])
    cotangent = torch.randn(2, 1, 2, 1, device=device).expand(2, 33, 2, 16)
    exact = run("reference", [t.double() for t in (q, k, v, E, F)], cotangent)
    plain = run("chunked", [q, k, v, E, F], cotangent)
    turned = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    spread = [torch.stack([E] * 2, -1)[..., 0], F]
    for moved in ([q, k, v, E, F], [*turned, E.mT.contiguous().mT, F.contiguous()], [q, k, v, *spread]):
        for value, wanted, yardstick in zip(run("triton", moved, cotangent), exact, plain, strict=True):
            verdict = judge(value, wanted, yardstick, torch.float32)
            assert verdict.ok, verdict


def test_nan_in_padded_slots_and_scratch_changes_nothing(device: str, monkeypatch: pytest.MonkeyPatch):
    tensors, mask = [t.to(device) for t in draw(20, batch=3, heads=2, groups=1)], padding(3, 20).to(device)
    cotangent = torch.randn(3, 20, 2, 16, device=device)
    clean = run("triton", tensors, cotangent, padding_mask=mask)
    assert bool((clean[0][~mask] == 0).all())
    dirty = [t.masked_fill(~mask[..., None, None], torch.nan) for t in tensors[:3]] + tensors[3:]
    for value, wanted in zip(run("triton", dirty, cotangent, padding_mask=mask), clean, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    empty = torch.empty

    def nan_filled(*args, **options):
        made = empty(*args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", nan_filled)
    for value, wanted in zip(run("triton", tensors, cotangent, padding_mask=mask), clean, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("padded", "keep", "dtype"), [
    (False, True, torch.float32), (True, True, torch.bfloat16), (False, False, torch.bfloat16),
])  # fmt: skip
def test_custom_operators_pass_opcheck(padded: bool, keep: bool, dtype: torch.dtype, device: str):
    given = draw(6, heads=2, groups=1, rank=4, own=padded)
    q, k, v, E, F = (t.to(device, dtype).requires_grad_() for t in given)
    mask = padding(2, 6).to(device) if padded else None
    forward = torch.ops.zoo.linformer_attention_fwd
    linformer_attention(q, k, v, E, F, backend="triton")  # registers the operators
    torch.library.opcheck(forward, (q, k, v, E, F, mask, keep))
    with torch.no_grad():
        y, keys, values, lse = forward(q, k, v, E, F, mask, keep)
        assert lse.numel() == (y.numel() // y.shape[3] if keep and dtype == torch.bfloat16 else 0)
        given = [t.detach() for t in (torch.randn_like(y), q, k, v, E, F, keys, values, y, lse)]
        torch.library.opcheck(torch.ops.zoo.linformer_attention_bwd, (*given, mask))


@pytest.mark.parametrize("padded", [False, True])
def test_the_kernels_compile_whole(padded: bool, device: str):
    sizes: dict = {"tokens": 20, "heads": 2, "groups": 1, "own": padded}
    options = {"padding_mask": padding(2, 20).to(device)} if padded else {}
    torch._dynamo.reset()

    def call(*given: Tensor) -> Tensor:
        return linformer_attention(*given, backend="triton", **options)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    leaves = [t.to(device).requires_grad_() for t in draw(**sizes)]
    grads = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    wanted = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    for value, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(value, expected)


def test_one_matrix_for_keys_and_values_gets_both_gradients(device: str):
    q, k, v, E, _ = (t.to(device) for t in draw(20, batch=1))
    apart = run("triton", [q, k, v, E, E], torch.ones_like(q))
    leaf = E.clone().requires_grad_()
    linformer_attention(q, k, v, leaf, leaf, backend="triton").sum().backward()
    torch.testing.assert_close(leaf.grad, apart[4] + apart[5])


def test_the_flop_counter_sees_both_directions(device: str):
    leaves = [t.to(device).requires_grad_() for t in draw(20)]
    with FlopCounterMode(display=False) as counter:
        y = linformer_attention(*leaves, backend="triton")
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == flops(2, 20, 4, 2, 16, 12)
    projections, attention = flops(2, 20, 0, 2, 16, 12), flops(2, 20, 4, 0, 16, 12)
    assert counter.get_total_flops() == forward + 2 * projections + attention * 5 // 2


def test_second_derivatives_and_large_tiles_are_refused_in_words(device: str):
    q, k, v, E, F = (t.to(device).requires_grad_() for t in draw(5))
    y = linformer_attention(q, k, v, E, F, backend="triton")
    (grad,) = torch.autograd.grad(y.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(grad.sum(), q)
    with pytest.raises(BackendError, match="on chip"):
        linformer_attention(*(t.to(device) for t in draw(5, rank=1100)), backend="triton")
    with pytest.raises(BackendError, match="256 channels"):
        linformer_attention(*(t.to(device) for t in draw(5, width=300)), backend="triton")

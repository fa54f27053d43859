"""Linformer attention: the plain path against the definition, padding, recorded cases, and words for bad inputs."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.alignment import RealFirst
from zoo.ops.dispatch import record_dispatch
from zoo.ops.linformer_attention import fits_on_chip, flops, linformer_attention

from golden import load_case
from sequence_mixer.conformance.budget import judge, relative_rms
from sequence_mixer.errors import BackendError, DtypeError, PackingError, ShapeError

PATHS = ("reference", "chunked")
CASES = {
    "one-token": {"tokens": 1},
    "shared": {"tokens": 37},
    "each-head": {"tokens": 37, "own": True},
    "longer-matrices": {"tokens": 29, "length": 50},
    "each-head-longer": {"tokens": 29, "length": 50, "own": True},
    "one-group": {"tokens": 130, "groups": 1},
    "one-row": {"tokens": 21, "rank": 1},
    "more-rows-than-tokens": {"tokens": 5, "rank": 12},
}


def draw(
    *, tokens: int, length: int | None = None, rank: int = 7, groups: int = 2, own: bool = False, width: int = 8
) -> list[Tensor]:
    """q, k, v, E and F in float64; F in the strides of a stored transpose."""
    length = length or tokens
    heads = (groups,) if own else ()
    sizes = [(2, tokens, 4, width), (2, tokens, groups, width), (2, tokens, groups, width), (*heads, rank, length)]
    tensors = [torch.randn(size, dtype=torch.float64) for size in sizes]
    return [*tensors, torch.randn(*heads, length, rank, dtype=torch.float64).mT]


def run(backend: str, tensors: list[Tensor], cotangent: Tensor, **options) -> list[Tensor]:
    """y and the gradients of q, k, v, E and F."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = linformer_attention(*leaves, backend=backend, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]


def padding(tokens: int) -> Tensor:
    """Left padded, right padded; rows 2 and 3 have no token and all tokens."""
    mask = torch.ones(4, tokens, dtype=torch.bool)
    mask[0, : tokens // 3] = False
    mask[1, tokens - tokens // 4 :] = False
    mask[2] = False
    return mask


def four_rows(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.cat([t, t.flip(1)]) for t in tensors[:3]] + tensors[3:]


@pytest.mark.parametrize("name", ["linformer", "linformer_one_kv_head", "linformer_share_kv", "linformer_short_input"])
@pytest.mark.parametrize("backend", PATHS)
def test_recorded_layers_come_back(name: str, backend: str):
    case = load_case(name)
    weights, x = case.parameters(), case.tensors["x"]
    width = weights["to_q.weight"].shape[0] // case.config["heads"]
    keys = weights["to_k.weight"]
    q, k, v = (
        (x @ weight.T).unflatten(2, (-1, width))
        for weight in (weights["to_q.weight"], keys, weights.get("to_v.weight", keys))
    )
    E = weights["proj_k"].mT
    F = weights["proj_v"].mT if "proj_v" in weights else E
    y = linformer_attention(q, k, v, E, F, backend=backend).flatten(2)
    assert relative_rms(y @ weights["to_out.weight"].T + weights["to_out.bias"], case.tensors["y"]) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_the_plain_path_equals_the_definition(name: str):
    tensors = draw(**CASES[name])
    cotangent = torch.randn_like(tensors[0])
    exact, ours = (run(backend, tensors, cotangent) for backend in PATHS)
    for value, wanted in zip(ours, exact, strict=True):
        verdict = judge(value, wanted, None, torch.float64)
        assert verdict.ok, verdict


@pytest.mark.parametrize("own", [False, True])
def test_the_definition_is_that_of_the_paper(own: bool):
    q, k, v, E, F = draw(tokens=11, length=14, own=own)
    y = linformer_attention(q, k, v, E, F, backend="reference")
    for h in range(4):
        g = h // 2
        e, f = (matrix[g] if own else matrix for matrix in (E, F))
        weights = (q[:, :, h] @ (e[:, :11] @ k[:, :, g]).mT / 8**0.5).softmax(-1)
        torch.testing.assert_close(y[:, :, h], weights @ (f[:, :11] @ v[:, :, g]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["shared", "each-head-longer"])
def test_narrow_dtypes_err_as_their_rounding_explains(name: str, dtype: torch.dtype):
    tensors = [t.to(dtype) for t in draw(**CASES[name])]
    cotangent = torch.randn(tensors[0].shape).to(dtype)
    exact = run("reference", [t.double() for t in tensors], cotangent.double())
    for value, wanted in zip(run("chunked", tensors, cotangent), exact, strict=True):
        assert value.dtype == dtype
        assert relative_rms(value, wanted) < {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("own", [False, True])
def test_a_padded_row_equals_the_row_without_padding(own: bool, backend: str):
    tensors, mask = four_rows(draw(tokens=17, length=20, own=own)), padding(17)
    cotangent = torch.randn_like(tensors[0])
    whole = run(backend, tensors, cotangent, padding_mask=mask)
    assert bool((whole[0][~mask] == 0).all())
    wanted = [torch.zeros_like(t) for t in whole]
    for b, real in enumerate(mask):
        row = [t[b : b + 1, real] for t in tensors[:3]] + tensors[3:]
        if not real.any():
            continue
        for total, value in zip(wanted, run(backend, row, cotangent[b : b + 1, real]), strict=True):
            if total.shape[:2] == mask.shape:
                total[b, real] = value[0]
            else:
                total += value
    for value, expected in zip(whole, wanted, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("backend", PATHS)
def test_nan_in_padded_slots_changes_nothing(backend: str):
    tensors, mask = four_rows(draw(tokens=17)), padding(17)
    cotangent = torch.randn_like(tensors[0])
    dirty = [t.masked_fill(~mask[..., None, None], torch.nan) for t in tensors[:3]] + tensors[3:]
    clean = run(backend, tensors, cotangent, padding_mask=mask)
    for value, wanted in zip(run(backend, dirty, cotangent, padding_mask=mask), clean, strict=True):
        assert torch.equal(value, wanted)


def test_turning_rows_puts_real_tokens_in_front_and_back():
    x, mask = torch.arange(24.0).view(4, 6) + 1, padding(6)
    aligned = RealFirst(mask)
    assert aligned.lengths.tolist() == [4, 5, 0, 6]
    turned = aligned.turn(x)
    for row, want, real in zip(turned, x, mask, strict=True):
        assert row.tolist() == [*want[real].tolist(), *[0.0] * int((~real).sum())]
    assert torch.equal(aligned.turn_back(turned), x * mask)


def test_no_tokens_are_served_by_the_definition():
    tensors = draw(tokens=4)
    empty = [t[:, :0] for t in tensors[:3]] + tensors[3:]
    with record_dispatch() as record:
        assert linformer_attention(*empty).shape == (2, 0, 4, 8)
    assert record[0].backend == "reference"
    assert record[0].reasons["chunked"] == "an input is empty"


def test_double_backward_is_that_of_the_definition():
    tensors = [t.requires_grad_() for t in draw(tokens=3, rank=2, width=2)]
    call = lambda *given: linformer_attention(*given, backend="reference")
    assert torch.autograd.gradgradcheck(call, tensors)


def test_the_flop_counter_agrees_with_the_formula():
    tensors = [t.float() for t in draw(tokens=64, rank=16)]
    with FlopCounterMode(display=False) as counter:
        linformer_attention(*tensors, backend="chunked")
    assert counter.get_total_flops() == flops(2, 64, 4, 2, 8, 16)


def test_autocast_does_not_change_the_dtype():
    tensors = [t.float() for t in draw(tokens=9)]
    with torch.autocast("cpu", torch.bfloat16):
        assert linformer_attention(*tensors).dtype == torch.float32
    half = [t.bfloat16() for t in tensors[:3]] + tensors[3:]
    assert linformer_attention(*half).dtype == torch.bfloat16


def test_bad_inputs_are_refused_in_words():
    q, k, v, E, F = draw(tokens=6)
    call = linformer_attention
    with pytest.raises(ShapeError, match="it looks transposed"):
        call(q, k, v, E.new_zeros(6, 4), F)
    with pytest.raises(ShapeError, match=r"F has shape \[7, 5\], wanted \[R, K\] with K >= T=6"):
        call(q, k, v, E, F[:, :5])
    with pytest.raises(ShapeError, match="same rank"):
        call(q, k, v, E[:3], F)
    with pytest.raises(ShapeError, match="at least one row"):
        call(q, k, v, E[:0], F[:0])
    with pytest.raises(ShapeError, match="G=2"):
        call(q, k, v, E.expand(4, -1, -1), F)
    with pytest.raises(ShapeError, match="multiple of G"):
        call(q[:, :, :3], k, v, E, F)
    with pytest.raises(ShapeError, match="v has shape"):
        call(q, k, v[:, :5], E, F)
    with pytest.raises(DtypeError, match=r"k is torch\.float32"):
        call(q, k.float(), v, E, F)
    with pytest.raises(PackingError, match="hole"):
        call(q, k, v, E, F, padding_mask=torch.tensor([[True, False, True] * 2] * 2))
    with pytest.raises(BackendError, match="chunked, reference"):
        call(q, k, v, E, F, backend="sdpa")


def test_the_kernels_say_what_they_cannot_hold():
    q, k, v, E, F = (t.float() for t in draw(tokens=6, rank=2))
    facts = {"width": 64, "element_size": 2, "empty": False}
    from zoo.ops.linformer_attention import _triton_refuses

    assert _triton_refuses(rank=512, **facts) is None
    assert "R=513 keys" in str(_triton_refuses(rank=513, **facts))
    assert "256 channels" in str(_triton_refuses(rank=2, width=300, element_size=2, empty=False))
    assert fits_on_chip(256, 128, 2)
    assert not fits_on_chip(256, 128, 4)
    assert not fits_on_chip(1025, 8, 2)
    with pytest.raises(BackendError, match="runs on cuda"):
        linformer_attention(q, k, v, E, F, backend="triton")

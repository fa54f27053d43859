"""The walks: linear attention without decay and SSD in half precision, against the float64 definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.linear_attention import linear_attention
from zoo.ops.semiseparable.cost import backward_flops, flops

from sequence_mixer.conformance.budget import judge
from ssd_cases import check_ssd, gradients, run_ssd, ssd_inputs

pytest.importorskip("triton")

HALF = [torch.bfloat16, torch.float16]
PACKED = [0, 0, 5, 69, 69, 70, 97, 97]
SSD = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("ends", [None, PACKED])
def test_ssd_is_within_budget(device: str, dtype: torch.dtype, ends: list[int] | None) -> None:
    given = ssd_inputs(device, 97, dtype, batch=1, sequences=None if ends is None else len(ends) - 1)
    check_ssd(given, ends)


@pytest.mark.parametrize(
    ("tokens", "sizes", "options"),
    [
        (2, {"batch": 3}, {}),
        (64, {"absent": ("D", "dt_bias", "initial_state")}, {"dt_limit": (0.05, 0.9)}),
        (65, {"width": 20, "channels": 5, "batch": 2}, {}),
        (65, {"rate": 300.0}, {"dt_softplus": False, "dt_limit": (0.0, math.inf)}),
        (40, {"heads": 2, "groups": 1, "width": 130, "channels": 40}, {}),
    ],
)
def test_ssd_options_are_within_budget(device: str, tokens: int, sizes: dict, options: dict) -> None:
    check_ssd(ssd_inputs(device, tokens, torch.bfloat16, **sizes), **options)


def test_ssd_forgets_everything_at_once(device: str) -> None:
    given = ssd_inputs(device, 70, torch.bfloat16)
    given["A"][0] = -1e30
    found, exact = (
        run_ssd({name: value.to(kind) for name, value in given.items()}, backend, dt_softplus=True)
        for kind, backend in ((None, "triton"), (torch.float64, "reference"))
    )
    for name in ("y", "final_state", "x", "B", "C", "D"):
        assert judge(found[name], exact[name], None, torch.bfloat16).ok, name


def test_ssd_passes_opcheck_and_counts_its_flops(device: str) -> None:
    from zoo.ops.ssd.triton_path import ssd_backward, ssd_forward

    given = ssd_inputs(device, 5, torch.bfloat16, heads=2, groups=1)
    leaves = [given[name].requires_grad_() for name in SSD]
    arguments = (*leaves[:7], True, 0.0, math.inf, leaves[7], None)
    torch.library.opcheck(ssd_forward, arguments)
    with FlopCounterMode(display=False) as counter:
        y, final = ssd_forward(*arguments)
        (y.float().sum() + final.sum()).backward()
    sizes = (1, 5, 2, 1, 16, 16)
    assert counter.get_total_flops() == flops(*sizes) + backward_flops(*sizes)
    plain = [leaf.detach() for leaf in leaves]
    cotangents = (torch.ones_like(y), torch.ones_like(final))
    torch.library.opcheck(ssd_backward, (*cotangents, *plain[:7], True, 0.0, math.inf, plain[7], None))


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_ssd_are_laid_out_as_the_compiler_is_told(device: str, dtype: torch.dtype) -> None:
    from zoo.ops.ssd.triton_path import ssd_backward

    given = ssd_inputs(device, 5, dtype, heads=2, groups=1)
    given |= {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("x", "dt")}
    plain = [given[name] for name in SSD]
    arguments = (torch.randn_like(given["x"]), None, *plain[:7], True, 0.0, math.inf, plain[7], None)
    torch.library.opcheck(ssd_backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("normalize", [False, True])
def test_linear_attention_passes_opcheck(device: str, normalize: bool) -> None:
    from zoo.ops.linear_attention.walk_path import walk_backward, walk_forward

    q, k, v = (torch.rand(1, 33, heads, 16, device=device).bfloat16().requires_grad_() for heads in (2, 2, 1))
    start = torch.rand(1, 2, 16, 16 + normalize, device=device).requires_grad_()
    arguments = (q, k[:, :, :1], v, start, None, normalize, 1e-6, 0.5)
    torch.library.opcheck(walk_forward, arguments)
    plain = [part.detach() for part in arguments[:4]]
    y, final, rows = walk_forward(*plain, *arguments[4:])
    given = (torch.ones_like(y), torch.ones_like(final), *plain, None, y if normalize else rows, rows, normalize, 0.5)
    torch.library.opcheck(walk_backward, given)


def check_linear(
    device: str,
    tokens: int,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    ends: list[int] | None,
    **options: object,
) -> None:
    """sizes: H, G, N, P."""
    heads, groups, width, channels = sizes
    normalize = bool(options.get("normalize"))
    sequences = 1 if ends is None else len(ends) - 1
    q, k = torch.randn(1, tokens, heads, width), torch.randn(1, tokens, groups, width)
    v, start = torch.randn(1, tokens, groups, channels), torch.randn(sequences, heads, width, channels + normalize)
    if normalize:
        q, k, start = q.abs(), k.abs(), start.abs()
    given = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "initial_state": start}
    given = {name: value.to(device) for name, value in given.items()}
    if ends is not None:
        options["cu_seqlens"] = torch.tensor(ends, device=device, dtype=torch.int32)
    results = {}
    for way, kind, backend in (
        ("exact", torch.float64, "reference"),
        ("plain", None, "chunked"),
        ("found", None, "triton"),
    ):
        leaves = {name: value.detach().to(kind).requires_grad_() for name, value in given.items()}
        y, final = linear_attention(**leaves, backend=backend, **options)
        results[way] = {"y": y.detach(), "final_state": final.detach()} | gradients(y, final, leaves)
    for name, value in results["found"].items():
        verdict = judge(value, results["exact"][name], results["plain"][name], dtype)
        assert verdict.ok, f"{name} {dtype} {sizes} {options}: {verdict}"


@pytest.mark.parametrize(
    ("dtype", "sizes", "options"),
    [
        (torch.bfloat16, (2, 1, 20, 33), {"normalize": True, "scale": 0.25, "eps": 1.0}),
        (torch.bfloat16, (2, 2, 16, 130), {"scale": 0.5}),
        (torch.float16, (2, 1, 130, 16), {"scale": 0.5}),
    ],
)
@pytest.mark.parametrize("ends", [None, PACKED])
def test_linear_attention_is_within_budget(
    device: str, dtype: torch.dtype, sizes: tuple[int, int, int, int], options: dict, ends: list[int] | None
) -> None:
    check_linear(device, 97, dtype, sizes, ends, **options)


def test_states_and_sums_beyond_float16_are_served(device: str) -> None:
    q, k, v = (torch.full((1, 100, 1, 16), value, device=device).half().requires_grad_() for value in (1e-4, 1e3, 1e2))
    y, final = linear_attention(q, k, v, backend="triton")
    assert float(final.detach().max()) == pytest.approx(1e7)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[0, -1, 0], torch.full((16,), 16e3, device=device).half(), rtol=4e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("sizes", [(4, 4, 128, 128), (4, 2, 64, 64), (2, 2, 256, 64), (2, 2, 64, 256), (2, 2, 200, 72)])
def test_long_linear_attention_is_within_budget_on_a_gpu(
    device: str, dtype: torch.dtype, sizes: tuple[int, int, int, int]
) -> None:
    if device != "cuda":
        pytest.skip("needs a CUDA device: too long for Triton's interpreter")
    for normalize in (False, True):
        check_linear(device, 2003, dtype, sizes, None, normalize=normalize)
        check_linear(device, 2003, dtype, sizes, [0, 3, 700, 700, 2003], normalize=normalize)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("groups", "width", "channels"), [(1, 128, 64), (4, 64, 64), (2, 16, 32), (1, 256, 128), (1, 100, 48)]
)
def test_long_ssd_is_within_budget_on_a_gpu(
    device: str, dtype: torch.dtype, groups: int, width: int, channels: int
) -> None:
    if device != "cuda":
        pytest.skip("needs a CUDA device: too long for Triton's interpreter")
    sizes = {"heads": 4, "groups": groups, "width": width, "channels": channels}
    check_ssd(ssd_inputs(device, 2003, dtype, batch=2, **sizes))
    check_ssd(ssd_inputs(device, 2003, dtype, sequences=4, **sizes), [0, 3, 700, 700, 2003])

"""The lean walks of FAVOR+ attention in bfloat16, as the other kernels are tested."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo.ops.favor_attention import favor_attention

from favor_cases import check, inputs, outgrowing, run
from sequence_mixer.conformance.budget import judge

pytest.importorskip("triton")


@pytest.fixture
def lean() -> dict[str, int]:
    """Sizes that lead to the lean walks."""
    from zoo.ops.favor_attention.kernels.walk_lean_launch import serves_lean

    assert serves_lean(128, 128, 128, torch.bfloat16, relu=False)
    return {"width": 128, "channels": 128, "rows": 128, "batch": 1, "groups": 1}


def in_bfloat16(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.bfloat16() if name in "qkv" else value for name, value in given.items()}


@pytest.mark.parametrize("name", ["several-chunks", "packed"])
def test_the_lean_walks_stay_within_budget(name: str, lean: dict[str, int], device: str) -> None:
    sizes, options = {
        "several-chunks": ({"tokens": 67, "heads": 1, "state": True}, {}),
        "packed": ({"tokens": 9, "heads": 2, "state": True, "sequences": 2}, {"cu_seqlens": torch.tensor([0, 0, 9])}),
    }[name]
    check(inputs(device, **lean | sizes), torch.bfloat16, **options)


def test_lean_walks_close_runs_and_lose_nothing(lean: dict[str, int], device: str) -> None:
    given = in_bfloat16(outgrowing(device, 5, width=128, channels=128, rows=128))
    exact = run({name: value.double() for name, value in given.items()}, "reference")
    plain, ours = run(given, "chunked"), run(given, "triton")
    for name in ("y", "v"):
        verdict = judge(ours[name], exact[name], plain[name], torch.bfloat16)
        assert verdict.ok, f"{name}: {verdict}"
    assert all(bool(value.isfinite().all()) for value in ours.values())


def test_lean_walks_know_nothing_of_the_future_and_repeat_every_bit(lean: dict[str, int], device: str) -> None:
    given = in_bfloat16(inputs(device, 40, heads=1, **lean))
    found, again = run(given, "triton"), run(given, "triton")
    assert all(torch.equal(found[name], again[name]) for name in found)
    for scale in (1.0, 10.0, 100.0):
        changed = {name: value.clone() for name, value in given.items()}
        for name in "qkv":
            changed[name][:, 21:] = scale * torch.randn_like(changed[name][:, 21:])
        changed["k"][:, 23] = 0.0  # outgrows keys of large norm
        y = favor_attention(**changed, backend="triton")[0]
        assert torch.equal(y[:, :21], found["y"][:, :21])
        assert not torch.equal(y[:, 21:], found["y"][:, 21:])
        assert bool(y.isfinite().all())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_lean_walks_end_on_inputs_that_are_no_numbers(lean: dict[str, int], bad: float, device: str) -> None:
    given = in_bfloat16(inputs(device, 30, heads=1, **lean))
    clean = favor_attention(**given, backend="triton")[0]
    given["k"][0, 21] = bad
    y = favor_attention(**given, backend="triton")[0]
    assert torch.equal(y[:, :21], clean[:, :21])
    assert not bool(y[:, 21:].isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1000, 4096])
def test_long_lean_walks_stay_within_budget_on_a_gpu(tokens: int, lean: dict[str, int], device: str) -> None:
    if device != "cuda":
        pytest.skip("lengths above 130 take too long in the interpreter; this needs a CUDA device")
    for rows in (128, 256):
        given = inputs(device, tokens, state=True, **lean | {"heads": 2, "rows": rows})
        check(given, torch.bfloat16)
        packed = inputs(device, tokens, **lean | {"heads": 2, "groups": 2, "rows": rows})
        check(packed, torch.bfloat16, cu_seqlens=torch.tensor([0, 3, 700, 700, tokens]))

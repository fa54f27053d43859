"""Inputs of SSD, and its comparison with the float64 definition: shared by the tests of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from zoo.ops.ssd import ssd

from sequence_mixer.conformance.budget import judge


def ssd_inputs(
    device: str,
    tokens: int,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    heads: int = 4,
    groups: int = 2,
    width: int = 16,
    channels: int = 16,
    sequences: int | None = None,
    rate: float = 4.0,
    absent: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    made = {
        "x": torch.randn(batch, tokens, heads, channels).to(dtype),
        "dt": torch.randn(batch, tokens, heads).to(dtype),
        "A": -torch.rand(heads) * rate,
        "B": torch.randn(batch, tokens, groups, width).to(dtype),
        "C": torch.randn(batch, tokens, groups, width).to(dtype),
        "D": torch.randn(heads),
        "dt_bias": torch.randn(heads) - 1.0,
        "initial_state": torch.randn(sequences or batch, heads, channels, width),
    }
    return {name: value.to(device) for name, value in made.items() if name not in absent}


def run_ssd(given: dict[str, Tensor], backend: str, **options: object) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    y, final = ssd(**leaves, backend=backend, **options)
    return {"y": y.detach(), "final_state": final.detach()} | gradients(y, final, leaves)


def gradients(y: Tensor, final: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    seeded = torch.Generator().manual_seed(7)
    dy, dfinal = (torch.randn(part.shape, generator=seeded).bfloat16().to(part) for part in (y, final))
    return dict(zip(leaves, torch.autograd.grad((y, final), list(leaves.values()), (dy, dfinal)), strict=True))


def check_ssd(given: dict[str, Tensor], ends: list[int] | None = None, **options: object) -> None:
    dtype = given["x"].dtype
    if ends is not None:
        options["cu_seqlens"] = torch.tensor(ends, device=given["x"].device)
    options = {"dt_softplus": True} | options
    exact = run_ssd({name: value.double() for name, value in given.items()}, "reference", **options)
    plain = run_ssd(given, "chunked", **options)
    for name, value in run_ssd(given, "triton", **options).items():
        assert value.dtype == plain[name].dtype, name
        verdict = judge(value, exact[name], plain[name], dtype)
        assert verdict.ok, f"{name}: {verdict}"

"""Inputs of FAVOR+ attention, its outcome with gradients, and the check of its kernels against the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from zoo.ops.favor_attention import favor_attention
from zoo.ops.favor_attention.features import feature_count

from sequence_mixer.conformance.budget import judge


def inputs(
    device: str,
    tokens: int,
    *,
    batch: int = 2,
    heads: int = 2,
    groups: int = 2,
    width: int = 16,
    channels: int = 16,
    rows: int = 24,
    keys: int | None = None,
    state: bool = False,
    sequences: int | None = None,
    features: str = "positive",
    **options: object,
) -> dict[str, Tensor]:
    source = tokens if keys is None else keys
    made = {
        "q": 0.7 * torch.randn(batch, tokens, heads, width),
        "k": 0.7 * torch.randn(batch, source, groups, width),
        "v": torch.randn(batch, source, groups, channels),
        "projection": torch.randn(rows, width),
    }
    if state:
        sums = torch.randn(sequences or batch, heads, feature_count(rows, features), channels + 2)
        sums[..., -2] = sums[..., -2].abs() + 1
        made["initial_state"] = sums if features != "relu" else torch.cat([sums[..., :-1], 0 * sums[..., -1:]], -1)
    return {name: value.to(device) for name, value in made.items()}


def run(given: dict[str, Tensor], backend: str, **options: object) -> dict[str, Tensor]:
    """y, final state and the gradients of q, k, v and the initial state for fixed cotangents."""
    leaves = {name: value.detach().requires_grad_(name != "projection") for name, value in given.items()}
    y, final = favor_attention(**leaves, backend=backend, **options)
    seeded = torch.Generator().manual_seed(5)
    dy, dfinal = (torch.randn(part.shape, generator=seeded).bfloat16().to(part) for part in (y, final))
    leaves.pop("projection")
    loss = (y * dy).sum() + (final[..., :-1] * dfinal[..., :-1]).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y.detach(), "final_state": final.detach()} | dict(zip(leaves, found, strict=True))


def check(given: dict[str, Tensor], dtype: torch.dtype, **options: object) -> None:
    options = {key: x.to(given["q"].device) if torch.is_tensor(x) else x for key, x in options.items()}
    given = {name: value.to(dtype) if name in "qkv" else value for name, value in given.items()}
    exact = run({name: value.double() for name, value in given.items()}, "reference", **options)
    plain = run(given, "chunked", **options)
    for name, value in run(given, "triton", **options).items():
        assert value.dtype == plain[name].dtype, name
        assert value.shape == plain[name].shape, name
        parts = {"sums": slice(None, -1), "maximum": slice(-1, None)} if name == "final_state" else {"": slice(None)}
        for part, columns in parts.items():  # the least maximum, 1e38, would hide every other number
            seen = exact[name][..., columns] > -1e30 if part == "maximum" else slice(None)
            each = [each[name][..., columns][seen] for each in ({name: value}, exact, plain)]
            verdict = judge(*each, dtype)
            assert verdict.ok, f"{name} {part} {dtype}: {verdict}"


def padding(tokens: int) -> Tensor:
    mask = torch.ones(3, tokens, dtype=torch.bool)
    mask[0, : tokens // 3] = False
    mask[1, tokens - tokens // 4 :] = False
    return mask


def outgrowing(device: str, tokens: int, **sizes: int) -> dict[str, Tensor]:
    """Keys whose norms shrink, so that features grow by about e^30 from one to the next."""
    given = inputs(device, tokens, batch=1, heads=1, groups=1, **sizes)
    norms = (60.0 * torch.arange(tokens, 0, -1, device=device)).sqrt() * sizes.get("width", 16) ** 0.25
    given["k"] = torch.nn.functional.normalize(given["k"], dim=-1) * norms[None, :, None, None]
    return given

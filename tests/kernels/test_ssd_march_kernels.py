"""SSD forward by the march, against the float64 definition: every scheme of its table, and the layouts it serves."""

from __future__ import annotations

import math

import pytest
import torch
from zoo.ops.ssd import ssd

from sequence_mixer.conformance.budget import judge
from ssd_cases import ssd_inputs

pytest.importorskip("triton")

from zoo.ops.ssd.kernels import march_launch
from zoo.ops.ssd.kernels.march_launch import Blocks

PACKED = [0, 0, 5, 37, 37, 38, 70, 70]


def check(given: dict[str, torch.Tensor], ends: list[int] | None = None, blocks: Blocks | None = None) -> None:
    bounds = None if ends is None else torch.tensor(ends, device=given["x"].device, dtype=torch.int32)
    options = {"dt_softplus": True, "cu_seqlens": bounds}
    exact = ssd(**{name: value.double() for name, value in given.items()}, backend="reference", **options)
    plain = ssd(**given, backend="chunked", **options)
    x, dt, A, B, C = (given[name] for name in ("x", "dt", "A", "B", "C"))
    rest = (given.get("D"), given.get("dt_bias"), True, (0.0, math.inf), given.get("initial_state"), bounds)
    found = march_launch.forward(x, dt, A, B, C, *rest, blocks)
    for name, value, wanted, near in zip(("y", "final state"), found, exact, plain, strict=True):
        verdict = judge(value, wanted, near, torch.bfloat16)
        assert verdict.ok, f"{name} {blocks}: {verdict}"


@pytest.mark.parametrize(
    ("tokens", "ends", "sizes", "blocks"),
    [
        (64, None, {"width": 128, "channels": 64, "groups": 1, "heads": 2}, None),
        (70, PACKED, {"width": 64, "channels": 64, "heads": 2}, None),
        (70, PACKED, {"width": 48, "channels": 32}, Blocks(32, 64, 1, 4, 3)),
        (33, None, {"width": 48, "channels": 32, "batch": 2}, Blocks(32, 64, 1, 4, 3, False)),
        (33, None, {"width": 144, "channels": 40, "heads": 1, "groups": 1, "batch": 2}, None),
        (70, PACKED, {"width": 144, "channels": 32, "heads": 2}, None),
        (40, None, {"width": 16, "channels": 80, "groups": 1, "absent": ("D", "dt_bias", "initial_state")}, None),
        (40, None, {"width": 128, "channels": 64, "heads": 2, "groups": 1}, Blocks(32, 128, 2, 8, 2)),
        (70, None, {"width": 32, "channels": 128, "heads": 1, "groups": 1}, Blocks(64, 128, 1, 8, 2)),
    ],
)
def test_the_march_is_within_budget(
    device: str, tokens: int, ends: list[int] | None, sizes: dict, blocks: Blocks | None
) -> None:
    sequences = None if ends is None else len(ends) - 1
    check(ssd_inputs(device, tokens, torch.bfloat16, sequences=sequences, **sizes), ends, blocks)


def test_views_of_a_projection_are_served(device: str) -> None:
    given = ssd_inputs(device, 40, torch.bfloat16, width=32, channels=64, heads=2, groups=1)
    joined = torch.cat([given[name].flatten(2) for name in ("x", "B", "C", "dt")], 2)
    x, B, C, dt = joined.split([128, 32, 32, 2], 2)
    check(given | {"x": x.unflatten(2, (2, 64)), "B": B.unflatten(2, (1, 32)), "C": C.unflatten(2, (1, 32)), "dt": dt})


def test_a_head_that_forgets_at_once_and_one_without_steps(device: str) -> None:
    given = ssd_inputs(device, 40, torch.bfloat16, channels=64, absent=("dt_bias",))
    given["A"][0] = -1e30
    given["dt"][:, 8:, 1] = -200.0  # a time step of 0
    check(given)


def test_which_sizes_are_served() -> None:
    def asked(dtype: torch.dtype = torch.bfloat16, heads: int = 4, channels: int = 64, width: int = 64) -> bool:
        x = torch.empty(1, 2, heads, channels, dtype=dtype)
        return march_launch.serves(x, torch.empty(1, 2, 2, width, dtype=dtype))

    assert all((asked(), asked(channels=32), asked(channels=48)))
    assert all(asked(width=width) for width in (16, 48, 128, 144, 256))
    assert not any(asked(width=width) for width in (8, 72, 272))
    assert not any((asked(torch.float16), asked(channels=32, heads=2), asked(channels=16)))
    assert all((asked(width=256, channels=16), asked(width=256, channels=32, heads=2)))

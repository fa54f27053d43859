"""SSD forward by walks along segments of sequences, against the float64 definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from zoo.ops.ssd import ssd

from sequence_mixer.conformance.budget import judge
from ssd_cases import check_ssd, ssd_inputs

pytest.importorskip("triton")

from zoo.ops.kernels.launcher import start
from zoo.ops.kernels.rows import cdiv
from zoo.ops.semiseparable.kernels.chunks import chunks_of, decay_sums
from zoo.ops.ssd.kernels import march_launch, segments

SLOW = {"rate": 0.01}  # nothing is forgotten within a test


def cut(monkeypatch: pytest.MonkeyPatch, count: int, **piece: int) -> None:
    """Cut every sequence into `count` segments, with these settings of their pieces."""
    monkeypatch.setattr(segments, "segments_for", lambda walks, tokens: count)
    monkeypatch.setattr(segments, "PIECE", segments.PIECE | {"tokens": 64} | piece)


def check(given: dict[str, Tensor], ends: list[int] | None = None) -> None:
    """The forward alone."""
    cu_seqlens = None if ends is None else torch.tensor(ends, device=given["x"].device)
    options = {"dt_softplus": True, "cu_seqlens": cu_seqlens}
    found = ssd(**given, backend="triton", **options)
    plain = ssd(**given, backend="chunked", **options)
    exact = ssd(**{name: value.double() for name, value in given.items()}, backend="reference", **options)
    for name, *parts in zip(("y", "final_state"), found, exact, plain, strict=True):
        verdict = judge(*parts, given["x"].dtype)
        assert verdict.ok, f"{name}: {verdict}"


@pytest.mark.parametrize(("walks", "tokens", "wanted"), [(512, 4096, 1), (128, 16384, 2), (64, 65536, 4), (4, 400, 1)])
def test_segments_fill_the_device_and_no_more(walks: int, tokens: int, wanted: int) -> None:
    assert segments.segments_for(walks, tokens) == wanted


@pytest.mark.parametrize("walks", [1, 3, 16, 100, 133, 192, 265, 300, 1000])
@pytest.mark.parametrize("tokens", [1, 1000, 5000, 10**6])
def test_segments_are_worth_their_pieces(walks: int, tokens: int) -> None:
    count = segments.segments_for(walks, tokens)
    assert 1 <= count <= max(1, tokens // segments.SHORTEST)
    if count > 1:
        assert cdiv(walks * count, segments.FULL) / count <= segments.GAIN * cdiv(walks, segments.FULL)


@pytest.mark.parametrize("tokens", [1, 63, 200])
@pytest.mark.parametrize("count", [2, 3])
def test_segments_of_slow_decays_are_within_budget(
    device: str, monkeypatch: pytest.MonkeyPatch, tokens: int, count: int
) -> None:
    cut(monkeypatch, count)
    check(ssd_inputs(device, tokens + 1, torch.bfloat16, batch=2, heads=2, groups=1, **SLOW))


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(torch.float16, SLOW), (torch.bfloat16, {"rate": 4.0}), (torch.bfloat16, {"width": 48, "channels": 20, **SLOW})],
)
def test_pieces_of_several_chunks_are_within_budget(
    device: str, monkeypatch: pytest.MonkeyPatch, tile: int, dtype: torch.dtype, sizes: dict[str, float]
) -> None:
    cut(monkeypatch, 2, tokens=1000, tile=tile)
    check(ssd_inputs(device, 390, dtype, heads=2, groups=2, absent=("D", "initial_state"), **sizes))


@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("tokens", [150, 160])
def test_marches_along_segments_are_within_budget(
    device: str, monkeypatch: pytest.MonkeyPatch, channels: int, tokens: int
) -> None:
    cut(monkeypatch, 2)
    given = ssd_inputs(device, tokens, torch.bfloat16, batch=2, heads=2, groups=1, channels=channels, **SLOW)
    assert march_launch.serves(given["x"], given["B"])
    asked = []
    monkeypatch.setattr(march_launch, "start", lambda *given: asked.append(given[2]) or start(*given))
    check(given)
    assert [constants["EVEN"] for constants in asked] == [tokens % march_launch.blocks_for(16).chunk == 0]


def test_marches_along_segments_of_packed_sequences_are_within_budget(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, 2)
    ends = [0, 0, 5, 69, 69, 160]
    check(ssd_inputs(device, 160, torch.bfloat16, heads=2, groups=1, channels=64, sequences=5, **SLOW), ends)


def test_segments_of_packed_sequences_are_within_budget(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 3)
    ends = [0, 0, 5, 69, 69, 270, 270]
    check(ssd_inputs(device, 270, torch.bfloat16, heads=2, groups=1, sequences=6, **SLOW), ends)


def test_states_may_grow(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 3)
    check(ssd_inputs(device, 260, torch.bfloat16, heads=2, groups=1, rate=-0.02))


def felt_chunks(given: dict[str, Tensor]) -> Tensor:
    """[H,chunks]: whether a NaN in a chunk is felt where the second of two segments begins."""
    chunks = chunks_of(given["x"], None, 64)
    B = given["B"]
    s, r = decay_sums(chunks, given["dt"], given["A"], None, False, (0.0, math.inf))
    felt = []
    for token in range(0, given["x"].shape[1], 64):
        x = given["x"].clone()
        x[:, token] = torch.nan
        begins, *_ = segments.states(chunks, x, B, s, r, None, None, 2, segments.PIECE)
        felt.append(begins[1].isnan().flatten(1).any(1))
    return torch.stack(felt, 1)


def test_what_is_forgotten_is_not_read(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads forget 2^-144 and 2^-1.44 in a chunk: a segment of 4 chunks needs 2 of them, or all before it."""
    cut(monkeypatch, 2)
    given = ssd_inputs(device, 512, torch.bfloat16, heads=2, groups=1)
    given |= {"dt": torch.ones_like(given["dt"]), "A": torch.tensor([-100 / 64, -1 / 64], device=device)}
    needed = felt_chunks(given)
    assert needed[0].tolist() == [False, False, True, True] + [False] * 4
    assert needed[1].tolist() == [True] * 4 + [False] * 4


def test_time_steps_of_nan_stay_nan_in_later_segments(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 2)
    given = ssd_inputs(device, 200, torch.bfloat16, heads=2, groups=1)
    given["dt"][0, 20] = torch.nan
    y, final = ssd(**given, dt_softplus=True, backend="triton")
    assert not y[:, :20].isnan().any()
    assert y[:, 20:].isnan().all()
    assert final.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "sizes", "ends"),
    [(3000, {"batch": 2}, None), (3072, {"batch": 2}, None), (3000, {"sequences": 3}, [0, 1000, 1000, 3000])],
)
@pytest.mark.parametrize("rate", [4.0, 0.01])
def test_long_sequences_are_within_budget_and_steady_on_a_gpu(
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    sizes: dict[str, int],
    ends: list[int] | None,
    rate: float,
) -> None:
    if device != "cuda":
        pytest.skip("needs a CUDA device: too large for Triton's interpreter")
    monkeypatch.setattr(segments, "SHORTEST", 256)
    given = ssd_inputs(device, tokens, torch.bfloat16, heads=16, groups=1, width=128, channels=64, rate=rate, **sizes)
    check_ssd(given, ends)
    cu_seqlens = None if ends is None else torch.tensor(ends, device=device)
    y, final = ssd(**given, dt_softplus=True, cu_seqlens=cu_seqlens, backend="triton")
    for _ in range(4):
        torch.randn(1 << 26, device=device)  # left behind in the allocator
        again = ssd(**given, dt_softplus=True, cu_seqlens=cu_seqlens, backend="triton")
        assert torch.equal(again[0], y)
        assert torch.equal(again[1], final)

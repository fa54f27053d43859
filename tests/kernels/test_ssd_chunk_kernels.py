"""SSD backward from states at the borders of its chunks, against the float64 definition."""

from __future__ import annotations

import pytest
import torch

from ssd_cases import check_ssd, run_ssd, ssd_inputs

pytest.importorskip("triton")

from zoo.ops.semiseparable.kernels.chunks import chunks_of

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: too large for the interpreter")


@pytest.mark.parametrize("tokens", [1, 5, 128, 129, 300])
def test_chunks_of_packed_rows_cover_every_token_once(tokens: int) -> None:
    ends = torch.tensor([0, 0, tokens // 3, tokens // 3, tokens, tokens], dtype=torch.int32)
    chunks = chunks_of(torch.empty(1, tokens, 1), ends, 64)
    covered = [token for first, live in chunks.table.tolist() for token in range(first, first + live)]
    assert sorted(covered) == list(range(tokens))
    owned = [range(a, b) for a, b in zip(chunks.first.tolist(), chunks.first.tolist()[1:], strict=False)]
    for (start, end), own in zip(zip(ends.tolist(), ends.tolist()[1:], strict=False), owned, strict=True):
        inside = [token for c in own for token in range(chunks.table[c, 0], chunks.table[c].sum())]
        assert inside == list(range(start, end))


@pytest.mark.parametrize("groups", [1, 2])
def test_sums_over_parts_of_a_group_are_within_budget(
    device: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.ops.ssd.kernels import launch

    monkeypatch.setattr(launch, "PAIRS", launch.PAIRS | {"HEADS": 1})
    monkeypatch.setattr(launch, "KEYS", launch.KEYS | {"HEADS": 2})
    check_ssd(ssd_inputs(device, 70, torch.bfloat16, heads=4, groups=groups))


@pytest.mark.parametrize("block_n", [32, 16])
def test_sums_over_parts_of_the_modes_are_within_budget(
    device: str, block_n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.ops.ssd.kernels import launch

    monkeypatch.setattr(launch, "KEYS", launch.KEYS | {"BLOCK_N": block_n})
    check_ssd(ssd_inputs(device, 150, torch.bfloat16, heads=2, groups=1, width=32))


@pytest.mark.parametrize("block_j", [32, 16])
def test_narrower_tiles_of_a_chunk_are_within_budget(
    device: str, block_j: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.ops.ssd.kernels import launch

    monkeypatch.setattr(launch, "PAIRS", launch.PAIRS | {"BLOCK_J": block_j})
    check_ssd(ssd_inputs(device, 150, torch.bfloat16, heads=2, groups=1))


@pytest.mark.parametrize(("width", "channels", "groups"), [(256, 16, 2), (128, 128, 1), (16, 192, 1)])
def test_wide_states_and_heads_are_within_budget(device: str, width: int, channels: int, groups: int) -> None:
    given = ssd_inputs(device, 20, torch.bfloat16, heads=2, groups=groups, width=width, channels=channels)
    check_ssd(given)
    check_ssd(given | {"initial_state": given["initial_state"].repeat(2, 1, 1, 1)}, [0, 7, 20])


def test_gradients_of_time_steps_of_zero_and_of_long_ones_are_within_budget(device: str) -> None:
    given = ssd_inputs(device, 140, torch.bfloat16, absent=("dt_bias",))
    given["dt"] = given["dt"].abs()
    given["dt"][0, ::3] = 0.0
    given["dt"][0, 1::7] = 300.0
    check_ssd(given, dt_softplus=False)


def test_time_steps_of_nan_stay_nan(device: str) -> None:
    given = ssd_inputs(device, 40, torch.bfloat16)
    given["dt"][0, 20] = torch.nan
    y = run_ssd(given, "triton", dt_softplus=True)["y"]
    assert not y[:, :20].isnan().any()
    assert y[:, 20:].isnan().all()


def test_views_of_a_wider_projection_are_served_without_a_copy_of_their_values(device: str) -> None:
    given = ssd_inputs(device, 70, torch.bfloat16, batch=2, heads=2, groups=1)
    wide = torch.cat([given[name].flatten(2) for name in ("x", "B", "C", "dt")], -1)
    parts = wide.split([given[name].flatten(2).shape[2] for name in ("x", "B", "C", "dt")], -1)
    views = {n: part.view(given[n].shape) for n, part in zip(("x", "B", "C", "dt"), parts, strict=True)}
    own = run_ssd(given, "triton")
    for name, value in run_ssd(given | views, "triton").items():
        assert torch.equal(value, own[name]), name


@ON_GPU
@pytest.mark.parametrize("heads", [64, 6])  # in pairs, and three of a group
@pytest.mark.parametrize(
    ("width", "channels"),
    [
        (16, 64),
        (32, 32),
        (64, 128),
        (128, 64),
        (128, 128),
        (128, 16),
        (128, 32),
        (64, 64),
        (256, 16),
        (256, 32),
        (256, 64),
        (256, 128),
    ],
)
def test_every_width_is_within_budget_on_a_gpu(width: int, channels: int, heads: int) -> None:
    given = ssd_inputs("cuda", 700, torch.bfloat16, batch=2, heads=heads, groups=2, width=width, channels=channels)
    check_ssd(given)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_go_to_the_device_of_their_inputs(dtype: torch.dtype) -> None:
    check_ssd(ssd_inputs("cuda:1", 300, dtype))


@ON_GPU
def test_few_long_packed_sequences_are_within_budget_on_a_gpu() -> None:
    given = ssd_inputs("cuda", 3000, torch.bfloat16, heads=16, groups=1, width=128, channels=64, sequences=4)
    check_ssd(given, [0, 1000, 1000, 1001, 3000])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "heads", "width", "channels"),
    [(1000, 64, 128, 64), (4096, 32, 64, 64), (20, 2, 128, 16), (1000, 32, 256, 64)],
)
def test_every_run_gives_the_same_bits_on_a_gpu(
    device: str, tokens: int, heads: int, width: int, channels: int
) -> None:
    """In memory that holds other numbers each time, with programs enough to meet on a multiprocessor."""
    if device != "cuda":
        pytest.skip("needs a CUDA device: nothing runs side by side in Triton's interpreter")
    sizes = {"heads": heads, "groups": 1, "width": width, "channels": channels}
    given = ssd_inputs(device, tokens, torch.bfloat16, batch=4, **sizes)
    first = run_ssd(given, "triton", dt_softplus=True)
    for _ in range(8):
        torch.randn(1 << 26, device=device)  # left behind in the allocator
        for name, value in run_ssd(given, "triton", dt_softplus=True).items():
            assert torch.equal(value, first[name]), name

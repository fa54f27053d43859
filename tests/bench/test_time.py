"""Time is shared out, samples are taken within it, and what does not fit is foreseen."""

import math
import time
from typing import Any

import pytest
import torch
from zoo.bench import timing
from zoo.bench.budget import Budget
from zoo.bench.cases import Case
from zoo.bench.memory import peak_bytes
from zoo.bench.run import foreseen_seconds, no_time_for
from zoo.bench.timing import time_samples

CPU = torch.device("cpu")


class TestBudget:
    def test_what_one_leaves_goes_to_the_others(self) -> None:
        now = [0.0]
        budget = Budget(100, clock=lambda: now[0])
        assert budget.share(3, until=0.3) == pytest.approx(10)
        now[0] = 4.0
        assert budget.share(2, until=0.3) == pytest.approx(13)
        assert budget.left() == pytest.approx(96)
        now[0] = 31.0
        assert budget.share(1, until=0.3) == 0
        assert budget.share(3) == pytest.approx(23)

    def test_no_limit(self) -> None:
        assert Budget(math.inf).share(7, until=0.3) == math.inf


class TestSamples:
    def test_a_quick_call_is_sampled_after_a_warm_up_and_not_without_end(self) -> None:
        calls: list[float] = []
        samples = time_samples(lambda: calls.append(time.perf_counter()), CPU, seconds=0.2)
        assert len(samples) == timing.MAX_SAMPLES
        assert len(samples) < len(calls) <= timing.MAX_CALLS
        assert all(sample >= 0 for sample in samples)

    def test_samples_are_milliseconds_and_at_least_five(self) -> None:
        samples = time_samples(lambda: time.sleep(0.02), CPU, seconds=0.01)
        assert len(samples) == timing.MIN_SAMPLES
        assert min(samples) >= 20

    def test_a_call_that_takes_the_whole_time_is_made_once(self) -> None:
        calls: list[int] = []

        def run() -> None:
            calls.append(1)
            time.sleep(0.05)

        assert len(time_samples(run, CPU, seconds=1.0, limit=0.1)) == len(calls) == 1

    def test_a_limit_ends_the_sampling_early(self) -> None:
        assert 1 <= len(time_samples(lambda: time.sleep(0.05), CPU, seconds=0.01, limit=0.16)) <= 3


def row(length: int, seconds: float, kind: str = "forward", **more: Any) -> dict[str, Any]:
    return {"mixer": "m", "kind": kind, "length": length, "samples_ms": [1e3 * seconds], "outcome": "done", **more}


class TestForesight:
    def test_a_call_is_extrapolated_by_the_power_seen_so_far(self) -> None:
        rows = {"a": row(128, 1.0)}
        assert foreseen_seconds(Case("m", "forward", 512, 1), rows) == 1.0
        rows["b"] = row(256, 2.0)
        assert foreseen_seconds(Case("m", "forward", 512, 1), rows) == pytest.approx(4.0)
        rows["b"] = row(256, 0.5)  # it does not get quicker for ever
        assert foreseen_seconds(Case("m", "forward", 512, 1), rows) == pytest.approx(0.5)
        assert foreseen_seconds(Case("m", "train step", 512, 1), rows) == 0
        assert foreseen_seconds(Case("other", "forward", 512, 1), rows) == 0

    def test_the_reason_says_what_a_call_takes_and_what_is_left(self) -> None:
        rows = {"a": row(128, 1.0), "b": row(256, 2.0)}
        case = Case("m", "forward", 512, 1)
        assert no_time_for(case, rows, 5.0) == ""
        assert no_time_for(case, rows, 3.0) == "a call takes about 4.0 s, 3.0 s are left for it"
        assert "is up" in no_time_for(case, rows, 0.0)

    def test_decode_goes_with_the_forward_pass_before_it(self) -> None:
        rows = {"m | forward | 512": {"mixer": "m", "kind": "forward", "length": 512, "outcome": "skipped"}}
        assert "was skipped" in no_time_for(Case("m", "decode", 512, 1), rows, 9.0)


def test_peak_memory_counts_what_lives_at_once() -> None:
    def run() -> None:
        first = torch.ones(2**20)  # 4 MiB
        second = first + 1
        del first
        del second
        torch.ones(2**19)

    assert 0 <= peak_bytes(run, CPU) - 8 * 2**20 < 256  # the 1 is a tensor too

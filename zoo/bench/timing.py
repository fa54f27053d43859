"""Times of one call: every sample is kept, the median is what is reported."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

MIN_SAMPLES, MAX_SAMPLES = 5, 200
WARM_UP = 0.2  # share of the measuring time on a CPU
MAX_CALLS = 2 * MAX_SAMPLES  # upper bound of the calls of one case, warm-up included
FLUSH_BYTES = 256 * 1024**2  # several times the L2 cache, so that each sample finds its inputs in memory


def time_samples(run: Callable[[], Any], device: torch.device, seconds: float, limit: float = math.inf) -> list[float]:
    """Milliseconds of repeated calls after warm-up, for about `seconds` in all, at least 5 samples.

    CUDA: events around each call, the cache flushed in between. CPU: the wall clock.
    limit: seconds that must not be passed by much; there are fewer samples if calls are that slow, and if the first
        call alone takes a third of it, that call is the only sample, and a cold one.
    """
    return _cuda_samples(run, seconds, limit) if device.type == "cuda" else _cpu_samples(run, seconds, limit)


def median(samples: list[float]) -> float:
    """Median of the samples, in their unit."""
    return statistics.median(samples)


def _cpu_samples(run: Callable[[], Any], seconds: float, limit: float) -> list[float]:
    begun = time.perf_counter()
    first = _timed(run)
    if first > limit / 3:
        return [_milliseconds(first)]
    for _ in range(MAX_CALLS - MAX_SAMPLES - 1):
        if time.perf_counter() - begun >= WARM_UP * seconds:
            break
        run()
    samples: list[float] = []
    while len(samples) < MAX_SAMPLES:
        spent = time.perf_counter() - begun
        if samples and (spent >= limit or (spent >= seconds and len(samples) >= MIN_SAMPLES)):
            break
        samples.append(_milliseconds(_timed(run)))
    return samples


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_samples(run: Callable[[], Any], seconds: float, limit: float) -> list[float]:
    for _ in range(3):  # compiles kernels; their first calls say nothing of the later ones
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - start, 1e-5)
    fewest = max(1, min(MIN_SAMPLES, int(min(limit, 1e6) / once)))
    count = int(min(MAX_SAMPLES, max(fewest, seconds / once)))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = [(_event(), _event()) for _ in range(count)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 6)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)

"""Times of one call: every sample is kept, the median is what is reported."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

MIN_SAMPLES, MAX_SAMPLES = 5, 200
FLUSH_BYTES = 256 * 1024**2  # several times the L2 cache, so that each sample finds its inputs in memory


def time_samples(run: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of repeated calls after warm-up, for about `seconds` in all, at least 5 samples.

    CUDA: events around each call, the cache flushed in between. CPU: the wall clock.
    """
    return _cuda_samples(run, seconds) if device.type == "cuda" else _cpu_samples(run, seconds)


def median(samples: list[float]) -> float:
    """Median of the samples, in their unit."""
    return statistics.median(samples)


def _cpu_samples(run: Callable[[], Any], seconds: float) -> list[float]:
    run()
    samples: list[float] = []
    begun = time.perf_counter()
    while len(samples) < MIN_SAMPLES or (time.perf_counter() - begun < seconds and len(samples) < MAX_SAMPLES):
        start = time.perf_counter()
        run()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def _cuda_samples(run: Callable[[], Any], seconds: float) -> list[float]:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    count = int(min(MAX_SAMPLES, max(MIN_SAMPLES, seconds / max(once, 1e-5))))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = [(_event(), _event()) for _ in range(count)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)

"""Peak memory that one call needs beyond what was allocated before it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Largest number of bytes allocated at once during `run`, above the level at its start.

    On a CPU, call `run` once before, so that what it keeps for good is there already.
    """
    if device.type != "cuda":
        return _cpu_peak_bytes(run)
    run()  # compiles kernels, and keeps what it keeps for good
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak_bytes(run: Callable[[], Any]) -> int:
    """From the profiler's allocation events; the CPU allocator keeps no counters."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of its start and stop otherwise
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run()
    profiler = profile.profiler
    if profiler is None or profiler.kineto_results is None:
        return 0
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for _, change in sorted(((event.start_ns(), event.nbytes()) for event in events), key=lambda entry: entry[0]):
        level += change
        peak = max(peak, level)
    return peak

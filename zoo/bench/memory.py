"""Peak memory that one call needs beyond what was allocated before it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Largest number of bytes allocated at once during `run`, above the level at its start."""
    if device.type == "cuda":
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    run()
    return _cpu_peak_bytes(run)


def _cpu_peak_bytes(run: Callable[[], Any]) -> int:
    """From the profiler's allocation events; the CPU allocator keeps no counters."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    level = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        level += change
        peak = max(peak, level)
    return peak

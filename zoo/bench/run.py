"""A whole comparison: conformance, then times and memory over lengths, then a short training run, per mixer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sequence_mixer.conformance import check_mixer
from sequence_mixer.errors import MixerError
from zoo.bench.cases import Case, Sizes, cases, prepare
from zoo.bench.machine import describe_machine
from zoo.bench.memory import peak_bytes
from zoo.bench.smoke import smoke_run
from zoo.bench.store import Results
from zoo.bench.timing import time_samples

Progress = Callable[[int, int, str], None]


def run(
    names: list[str],
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    path: Path,
    *,
    fresh: bool = False,
    train: bool = True,
    check: bool = True,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Results:
    """Measure every mixer of `names`, going on with what `path` already holds; saves after each measurement."""
    about = {**describe_machine(device), "dtype": str(dtype), "sizes": asdict(sizes)}
    results, word = Results.open(path, about, fresh)
    if word and tell is not None:
        tell(word)
    plan: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for name in names:
        if check:
            plan.append((f"{name} | conformance", lambda name=name: conformance_row(name, device)))  # type: ignore[misc]
        for case in cases(name, sizes):
            plan.append((case.key, lambda case=case: case_row(case, sizes, device, dtype)))  # type: ignore[misc]
        if train:
            plan.append((f"{name} | smoke run", lambda name=name: smoke_run(name, sizes, device)))  # type: ignore[misc]
    for done, (key, measure) in enumerate(plan):
        if progress is not None:
            progress(done, len(plan), key)
        if key not in results.rows:
            results.add(key, measure())
            gc.collect()
    if progress is not None:
        progress(len(plan), len(plan), "done")
    results.save()
    return results


def case_row(case: Case, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Measure one case: all samples, peak memory, and the cost model's numbers beside them."""
    row: dict[str, Any] = {**asdict(case)}
    try:
        ready = prepare(case, sizes.d_model, device, dtype)
        row["samples_ms"] = time_samples(ready.run, device, sizes.seconds)
        if case.kind == "train step":
            row["peak_bytes"] = peak_bytes(ready.run, device)
        row.update(
            flops=ready.flops, bytes=ready.bytes, parameters=ready.parameters, state_bytes=ready.state_bytes,
            config=ready.mixer.config.model_dump(mode="json"), backend=ready.mixer.backend,
        )  # fmt: skip
    except torch.cuda.OutOfMemoryError:
        row["reason"] = "out of memory"
    return row


def conformance_row(name: str, device: torch.device) -> dict[str, Any]:
    """The conformance suite on the default example; "green", or the failed checks."""
    try:
        report = check_mixer(name, device=str(device), examples=["default"])
    except MixerError as error:
        return {"mixer": name, "verdict": f"RED: {error}"}
    failed = sorted({result.check for result in report.results if result.status == "failed"})
    return {"mixer": name, "verdict": "green" if report.ok else "RED: " + ", ".join(failed), "failed": failed}

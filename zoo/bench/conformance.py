"""Conformance before speed: the suite on a mixer's default example, as far as the time allows."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from sequence_mixer.conformance.suite import Task, plan, run_task
from zoo.bench.store import DONE, SKIPPED
from zoo.registry import registry


def conformance_row(name: str, device: torch.device, seconds: float = math.inf) -> dict[str, Any]:
    """Run the suite on the example "default" for about `seconds`; one check of every clause comes first.

    The verdict is "red" if a check failed, "green" if all ran, "green so far" if the time was up before the last one,
    "unchecked" if it was up before the first. `left_out` names what did not run, `failures` has a message per failure.
    Raises UnknownMixer, RegistryError.
    """
    tasks = _every_clause_first(list(plan(registry.definition(name), device=str(device), examples=["default"])))
    begun = time.monotonic()
    passed = 0
    failures: dict[str, str] = {}
    ran = 0
    for task in tasks:
        if time.monotonic() - begun >= seconds:
            break
        result = run_task(task)
        ran += 1
        passed += result.status == "passed"
        if result.status == "failed":
            failures[task.check.id] = result.message
    return {
        "mixer": name,
        "kind": "conformance",
        "outcome": DONE if ran else SKIPPED,
        "verdict": _verdict(bool(failures), ran, len(tasks)),
        "ran": ran,
        "of": len(tasks),
        "passed": passed,
        "failures": failures,
        "left_out": [task.check.id for task in tasks[ran:]],
    }


def _every_clause_first(tasks: list[Task]) -> list[Task]:
    """The first check of each clause, then the second of each, and so on; the expensive ones at the end."""
    seen: dict[str, int] = {}
    places = {}
    for task in tasks:
        seen[task.check.clause] = places[task.id] = seen.get(task.check.clause, -1) + 1
    return sorted(tasks, key=lambda task: (task.check.default_only, places[task.id]))


def _verdict(failed: bool, ran: int, of: int) -> str:
    if failed:
        return "red"
    if ran == of:
        return "green"
    return "green so far" if ran else "unchecked"

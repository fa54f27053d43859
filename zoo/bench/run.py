"""A whole comparison: conformance of every mixer, a short training run of each, then times and memory over lengths.

Lengths rise from one end of the run to the other and mixers take turns at each, so that mixers are measured under the
same conditions, and a run that is out of time has the same lengths for all.
"""

from __future__ import annotations

import functools
import gc
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from sequence_mixer.errors import MixerError
from zoo.bench.budget import Budget
from zoo.bench.cases import KINDS, Case, Sizes, cases, prepare
from zoo.bench.conformance import conformance_row
from zoo.bench.memory import peak_bytes
from zoo.bench.smoke import smoke_run
from zoo.bench.store import DONE, FAILED, SKIPPED, Results, Row, Rows
from zoo.bench.timing import median, time_samples
from zoo.tasks.text_corpus import Corpus, load_corpus

Progress = Callable[[int, int, str], None]

# Shares of a run's time after which conformance and the smoke runs have to be over; what they leave goes to the times.
CONFORMANCE_UNTIL, SMOKE_UNTIL, CASES_UNTIL = 0.3, 0.5, 1.0
SLACK = 4.0  # how many times its share a slow case or smoke run may take; most take less than their share
PROFILED = 4.0  # a call under the memory profiler against a plain one, roughly


@dataclass(frozen=True)
class Task:
    """One measurement of a run.

    key: of its row. about: what the row says whatever comes of it. until: share of the time after which it has to be
        over. measure: called with the seconds of its even share, and the most that it may take.
    """

    key: str
    about: Row
    until: float
    measure: Callable[[float, float], Row]


def run(
    names: Sequence[str],
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    results: Results,
    *,
    seconds: float = math.inf,
    train: bool = True,
    check: bool = True,
    progress: Progress | None = None,
) -> Rows:
    """Measure every mixer of `names` as far as `seconds` allow, going on with what `results` holds.

    A mixer that raises gets a row that says so. progress: called with (tasks done, tasks in all, what runs now).
    Returns the rows of these mixers.
    """
    budget = Budget(seconds)
    tasks = plan(names, sizes, device, dtype, results, train=train, check=check)
    waiting = [task for task in tasks if not results.done(task.key)]
    done = len(tasks) - len(waiting)
    for index, task in enumerate(waiting):
        if progress is not None:
            progress(done + index, len(tasks), task.key)
        in_phase = sum(other.until == task.until for other in waiting[index:])
        share = budget.share(in_phase, task.until)
        row = guarded(task, share, min(SLACK * share, budget.left(task.until)))
        results.add(task.key, row)
        if device.type == "cuda" or row["outcome"] == FAILED:
            gc.collect()
    if progress is not None:
        progress(len(tasks), len(tasks), "done")
    return {key: row for key, row in results.rows.items() if row["mixer"] in names}


def plan(
    names: Sequence[str],
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    results: Results,
    *,
    train: bool,
    check: bool,
) -> list[Task]:
    """Every measurement in its order; a mixer that does not load, or not at this width, has one that fails."""
    corpus = functools.cache(load_corpus)  # read once, when the first smoke run asks for it
    checks, smoke_runs = [], []
    timed: list[Case] = []
    for name in names:
        try:
            timed += cases(name, sizes)
        except Exception as error:  # a plugin that breaks in its config is a row of its own, too
            checks.append(_broken_task(name, error))
            continue
        if check:
            checks.append(_check_task(name, device))
        if train:
            smoke_runs.append(_smoke_task(name, sizes, device, corpus))
    timed.sort(key=lambda case: (case.length, KINDS.index(case.kind)))
    return [*checks, *smoke_runs, *(_case_task(case, sizes, device, dtype, results.rows) for case in timed)]


def guarded(task: Task, share: float, limit: float) -> Row:
    """The row of a task, or one that says what the mixer raised."""
    row: Row = {**task.about, "outcome": FAILED}
    try:
        return task.measure(share, limit)
    except torch.cuda.OutOfMemoryError:
        return {**row, "error": "out of memory", "trace": ""}
    except Exception as error:  # whatever a mixer raises is its own row, and not the end of the run
        first = (str(error).strip().splitlines() or [""])[0]
        trace = "" if isinstance(error, MixerError) else traceback.format_exc()
        return {**row, "error": f"{type(error).__name__}: {first}"[:400], "trace": trace}


def case_row(
    case: Case,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = math.inf,
    limit: float = math.inf,
) -> Row:
    """Measure one case for about `seconds`, `limit` at most: all samples, peak memory, the cost model's numbers."""
    row: Row = {**asdict(case), "outcome": DONE}
    ready = prepare(case, sizes.d_model, device, dtype)
    row |= {
        "config": ready.mixer.config.model_dump(mode="json"),
        "causal": ready.mixer.capabilities.causal,
        "backend": ready.mixer.backend,
        "parameters": ready.parameters,
    }
    row["samples_ms"] = time_samples(ready.run, device, min(sizes.seconds, seconds / 2), limit)
    if case.kind == "forward":  # the cost model is one of `forward`
        row |= {"flops": ready.flops, "bytes": ready.bytes}
    if case.kind == "decode":
        row["state_bytes"] = ready.state_bytes
    if case.kind == "train step" and PROFILED * median(row["samples_ms"]) / 1e3 < limit:
        row["peak_bytes"] = peak_bytes(ready.run, device)
    return row


def no_time_for(case: Case, rows: Rows, limit: float) -> str:
    """Why a case is not begun, judged by what shorter lengths took, or ""."""
    if limit <= 0:
        return "the time of the run is up"
    if case.kind == "decode" and rows.get(f"{case.mixer} | forward | {case.length}", {}).get("outcome") == SKIPPED:
        return "the forward pass that comes before it was skipped"
    call = foreseen_seconds(case, rows)
    if call > limit:
        return f"a call takes about {call:.1f} s, {limit:.1f} s are left for it"
    return ""


def foreseen_seconds(case: Case, rows: Rows) -> float:
    """Seconds of one call, extrapolated from the two longest lengths measured; 0 if there is none."""
    known = sorted(
        (row["length"], median(row["samples_ms"]) / 1e3)
        for row in rows.values()
        if row["mixer"] == case.mixer and row["kind"] == case.kind and "samples_ms" in row
        and row["length"] < case.length
    )  # fmt: skip
    if not known:
        return 0.0
    length, seconds = known[-1]
    if len(known) == 1:
        return seconds
    before, faster = known[-2]
    power = min(2.0, max(0.0, math.log(seconds / faster) / math.log(length / before)))
    return float(seconds * (case.length / length) ** power)


def _case_task(case: Case, sizes: Sizes, device: torch.device, dtype: torch.dtype, rows: Rows) -> Task:
    def measure(seconds: float, limit: float) -> Row:
        reason = no_time_for(case, rows, limit)
        if reason:
            return {**asdict(case), "outcome": SKIPPED, "reason": reason}
        return case_row(case, sizes, device, dtype, seconds, limit)

    return Task(case.key, asdict(case), CASES_UNTIL, measure)


def _check_task(name: str, device: torch.device) -> Task:
    def measure(seconds: float, limit: float) -> Row:
        return conformance_row(name, device, seconds)

    return Task(f"{name} | conformance", {"mixer": name, "kind": "conformance"}, CONFORMANCE_UNTIL, measure)


def _smoke_task(name: str, sizes: Sizes, device: torch.device, corpus: Callable[[], Corpus]) -> Task:
    def measure(seconds: float, limit: float) -> Row:
        return smoke_run(name, sizes, device, corpus(), limit)

    return Task(f"{name} | smoke run", {"mixer": name, "kind": "smoke run"}, SMOKE_UNTIL, measure)


def _broken_task(name: str, error: Exception) -> Task:
    def measure(seconds: float, limit: float) -> Row:
        raise error

    return Task(f"{name} | build", {"mixer": name, "kind": "build"}, CONFORMANCE_UNTIL, measure)

"""Runs the checks on a mixer, named or defined."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from sequence_mixer.conformance.catalogue import Check, CheckFailed, CheckSkipped, chosen_checks
from sequence_mixer.conformance.probes import Subject
from sequence_mixer.conformance.report import Report, Result, Status
from sequence_mixer.definition import MixerDef
from sequence_mixer.errors import ConfigError, DeviceError, DtypeError, suggest
from sequence_mixer.host import host

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Task:
    """One check on one subject. known: why it is known to fail, or None."""

    check: Check
    subject: Subject
    known: str | None

    @property
    def dtype(self) -> str:
        return str(self.subject.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        """Mixer, example and check; the dtype too where the caller chose it."""
        ends = f"-{self.dtype}" if self.check.precision != "float64" and self.dtype != "float64" else ""
        return f"{self.subject.name}-{self.subject.example}-{self.check.id}{ends}"

    def run(self) -> None:
        """Raises CheckFailed, CheckSkipped, or whatever the mixer raises. Leaves the random state as it was."""
        devices = [self.subject.device] if self.subject.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(0)
            self.check.function(self.subject)


def plan(
    definition: MixerDef,
    *,
    device: str = "cpu",
    dtypes: Sequence[str] = ("float32",),
    checks: Sequence[str] | None = None,
    examples: Sequence[str] | None = None,
) -> Iterator[Task]:
    """Every task that the declaration of `definition` calls for; arguments as in `check_mixer`."""
    for kind in dtypes:
        if kind not in DTYPES:
            raise DtypeError(f"no dtype {kind!r}{suggest(kind, DTYPES)}; the suite runs in {', '.join(DTYPES)}")
    wanted = list(definition.examples) if examples is None else list(examples)
    for key in wanted:
        if key not in definition.examples:
            known = ", ".join(definition.examples)
            raise ConfigError(f"mixer {definition.name!r} has no example {key!r}; it has: {known}")
    selected = chosen_checks(None if checks is None else list(checks))
    reasons = _known_failures(definition)
    where = torch.device(device)
    if device == "cuda":  # tensors name the device by its number
        where = torch.device("cuda", torch.cuda.current_device())
    for key in wanted:
        config = definition.example(key)
        capabilities = definition.capabilities_of(config)
        for entry in selected:
            if not entry.applies(capabilities) or (entry.default_only and key != "default"):
                continue
            for kind in entry.dtypes(device, tuple(dtypes)):
                known_as = reasons.get(f"{key}:{entry.id}", reasons.get(entry.id))
                yield Task(entry, Subject(definition, key, config, where, DTYPES[kind]), known_as)


def check_mixer(
    mixer: str | MixerDef,
    *,
    device: str = "cpu",
    dtypes: Sequence[str] = ("float32",),
    checks: Sequence[str] | None = None,
    examples: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run the conformance suite on one mixer.

    mixer: a registered name, or a definition.
    device: "cpu", "cuda", "cuda:1". Every check runs there.
    dtypes: names of the dtypes in which backends are compared with the float64 reference; on an accelerator the other
        numerical checks run in them too. The rest runs in float64.
    checks: ids or clauses ("SM-2"); all by default. examples: keys of the definition's examples; all by default.
    progress: called with (tasks done, tasks in all, what runs now).
    Raises UnknownMixer, ConfigError, DtypeError, DeviceError for wrong arguments; a failing check is in the report.
    """
    definition = host().definition(mixer) if isinstance(mixer, str) else mixer
    require_device(device)
    tasks = list(plan(definition, device=device, dtypes=dtypes, checks=checks, examples=examples))
    report = Report(definition.name, device)
    for done, task in enumerate(tasks):
        if progress is not None:
            progress(done, len(tasks), f"{task.subject.example} {task.check.id}")
        report.results.append(run_task(task))
    if progress is not None:
        progress(len(tasks), len(tasks), "done")
    return report


def run_task(task: Task) -> Result:
    """Run one task and say how it went; a known failure that passes has failed."""
    begin = time.perf_counter()
    status: Status = "passed"
    message = ""
    try:
        task.run()
    except CheckSkipped as reason:
        status, message = "skipped", str(reason)
    except CheckFailed as failure:
        status, message = "failed", str(failure)
    except Exception as error:  # whatever a mixer raises is a finding, not the end of the suite
        place = traceback.extract_tb(error.__traceback__)[-1]
        status = "failed"
        message = f"{task.subject.name}: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    if task.known is not None:
        if status == "failed":
            status, message = "known_failure", f"{task.known} ({message})"
        elif status == "passed":
            status, message = "failed", f"passes, but is a known failure ({task.known}); remove it from known_failures"
    seconds = time.perf_counter() - begin
    return Result(task.check.id, task.check.clause, task.subject.example, task.dtype, status, message, seconds)


def require_device(device: str) -> None:
    """Raise DeviceError if the device does not exist here."""
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device {device!r} was asked for and there is no CUDA device here; use device='cpu'")


def _known_failures(definition: MixerDef) -> dict[str, str]:
    """Reasons by id, or by "example:id". Raises ConfigError for an id that no check has."""
    reasons = {}
    for key, reason in definition.known_failures.items():
        example, _, name = key.rpartition(":")
        if example and example not in definition.examples:
            raise ConfigError(f"mixer {definition.name!r}: known_failures names the example {example!r}, not its own")
        [entry] = chosen_checks([name])  # a clause is not an id
        reasons[f"{example}:{entry.id}" if example else entry.id] = reason
    return reasons

"""What came out of the checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sequence_mixer.conformance.catalogue import CheckFailed

Status = Literal["passed", "failed", "skipped", "known_failure"]


@dataclass(frozen=True)
class Result:
    """One check on one example. message: why it failed or was skipped; empty if it passed. seconds: wall-clock."""

    check: str
    clause: str
    example: str
    dtype: str
    status: Status
    message: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """Results of the suite on one mixer, in the order they ran."""

    mixer: str
    device: str
    results: list[Result] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if something ran and nothing failed; a known failure that passes has failed."""
        return any(result.status == "passed" for result in self.results) and not list(self.failures())

    def failures(self) -> Iterator[Result]:
        """The results that failed."""
        return (result for result in self.results if result.status == "failed")

    def raise_on_failure(self) -> None:
        """Raise CheckFailed with one line per failure, if there is one; or if no check ran at all."""
        lines = [f"{r.clause} {r.check} [{r.example}, {r.dtype}]: {r.message}" for r in self.failures()]
        if lines:
            raise CheckFailed(f"{len(lines)} of {len(self.results)} checks failed\n" + "\n".join(lines))
        if not self.ok:
            raise CheckFailed(f"{self.mixer}: no check ran")

    def to_json(self) -> dict[str, Any]:
        """A mapping that `json.dump` takes."""
        return {**asdict(self), "ok": self.ok}

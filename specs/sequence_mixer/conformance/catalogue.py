"""The list of checks: each is a function with a stable id, a clause of the contract, and a rule when it applies."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sequence_mixer.errors import ConfigError, suggest

if TYPE_CHECKING:
    from sequence_mixer.conformance.probes import Subject
    from sequence_mixer.definition import Capabilities

CheckFunction = Callable[["Subject"], None]
Precision = Literal["float64", "asked", "both"]

# Modules that hold checks, in the order of their clauses.
MODULES = (
    "interface",
    "causality",
    "stateful",
    "packed",
    "padded",
    "length",
    "matrix",
    "backends",
    "purity",
    "precision",
    "round_trips",
    "configs",
    "transforms",
    "cost",
    "growth",
    "declared",
    "training",
)

_checks: dict[str, Check] = {}


class CheckFailed(AssertionError):
    """A mixer breaks the clause that a check stands for; the message says how."""


class CheckSkipped(Exception):
    """A check cannot run here; the message says why."""


@dataclass(frozen=True)
class Check:
    """One check.

    id: stable name, the function's without `check_`. clause: of `specs/sequence_mixer.md`.
    applies: asked with the capabilities of the example's config.
    precision: "float64" runs once in float64; "asked" once in each dtype the caller asks for; "both" in float64, and
        on an accelerator, where other implementations serve other dtypes, in each dtype asked for as well.
    default_only: expensive, so it runs on the example "default" alone.
    """

    id: str
    clause: str
    function: CheckFunction
    applies: Callable[[Capabilities], bool]
    precision: Precision
    default_only: bool

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    def dtypes(self, device: str, asked: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the dtypes it runs in."""
        if self.precision == "asked":
            return asked
        more = asked if self.precision == "both" and not device.startswith("cpu") else ()
        return ("float64", *(name for name in more if name != "float64"))


def always(capabilities: Capabilities) -> bool:
    """The rule of a check that every mixer has to pass."""
    return True


def declares(*flags: str) -> Callable[[Capabilities], bool]:
    """The rule of a check for mixers that declare all of `flags`."""
    return lambda capabilities: all(capabilities.has(flag) for flag in flags)


def check(
    clause: str,
    *,
    applies: Callable[[Capabilities], bool] = always,
    precision: Precision = "float64",
    default_only: bool = False,
) -> Callable[[CheckFunction], CheckFunction]:
    """Enter a function `check_...(subject)` into the list under its name without `check_`."""

    def enter(function: CheckFunction) -> CheckFunction:
        name = function.__name__
        if not name.startswith("check_") or name.removeprefix("check_") in _checks:
            raise ConfigError(f"a check is a function check_<id> with an id of its own, got {name}")
        entry = Check(name.removeprefix("check_"), clause, function, applies, precision, default_only)
        _checks[entry.id] = entry
        return function

    return enter


def all_checks() -> list[Check]:
    """Every check of the suite, in the order of the clauses."""
    for module in MODULES:
        importlib.import_module(f"sequence_mixer.conformance.{module}")
    return list(_checks.values())


def chosen_checks(wanted: list[str] | tuple[str, ...] | None) -> list[Check]:
    """Checks named by id ("check_" in front is ignored) or by clause ("SM-2"); all by default.

    Raises ConfigError for a word that is neither.
    """
    known = all_checks()
    if wanted is None:
        return known
    chosen: set[str] = set()
    for word in wanted:
        plain = word.removeprefix("check_")
        matching = {entry.id for entry in known if plain in (entry.id, entry.clause)}
        if not matching:
            hint = suggest(plain, [entry.id for entry in known])
            raise ConfigError(f"no check {word!r}{hint}; checks are listed in the contract, or take a clause as 'SM-2'")
        chosen |= matching
    return [entry for entry in known if entry.id in chosen]

"""Mixers by name: entry points are read as metadata, plugins are imported one at a time and only when asked for.

A distribution adds a mixer by one entry point per name in the group `zoo.mixers`; the value is the import package
whose `zoo_register_mixers` hook returns the definitions. A plugin that fails keeps its reason and its traceback, and
takes nobody else down.
"""

from __future__ import annotations

import os
import re
import threading
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions

import pluggy

from sequence_mixer import hookspecs
from sequence_mixer.definition import MixerDef
from sequence_mixer.errors import MixerError, RegistryError, UnknownMixer, unknown_name

MIXERS, CONTRACT = "zoo.mixers", "zoo.contract"
DISABLE = "ZOO_DISABLE_PLUGINS"


@dataclass(frozen=True)
class Claim:
    """One entry point: a mixer name, the import package behind it, and the distribution that brings it."""

    name: str
    package: str
    distribution: str
    version: str
    contract: str
    entry: EntryPoint


@dataclass(frozen=True)
class Plugin:
    """State of one import package as `zoo plugins` shows it.

    status: "loaded", "failed" or "off". reason: one line for the last two. trace: full traceback, or "".
    """

    package: str
    distribution: str
    version: str
    contract: str
    names: tuple[str, ...]
    status: str
    reason: str = ""
    trace: str = ""


class Registry:
    """The mixers of the installed distributions."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._claims: list[Claim] | None = None
        self._loaded: dict[str, dict[str, MixerDef]] = {}  # package -> its definitions
        self._failed: dict[str, tuple[str, str]] = {}  # package -> reason, traceback

    def reload(self) -> None:
        """Forget everything; the next question reads the installed metadata again."""
        with self._lock:
            self._claims = None
            self._loaded.clear()
            self._failed.clear()

    def claims(self) -> list[Claim]:
        """All entry points of the group `zoo.mixers`, by name; nothing is imported."""
        with self._lock:
            if self._claims is None:
                self._claims = sorted(_read_claims(distributions()), key=lambda claim: (claim.name, claim.package))
            return self._claims

    def names(self) -> list[str]:
        """Names of the mixers that are installed and not switched off, sorted; nothing is imported."""
        off = switched_off()
        return sorted({claim.name for claim in self.claims() if not _is_off(claim, off)})

    def definition(self, name: str) -> MixerDef:
        """The definition of a mixer; imports its plugin on first use.

        Raises UnknownMixer for a name nobody registers, RegistryError if two distributions claim it, its contract
        is not supported, or its plugin does not load.
        """
        with self._lock:
            off = switched_off()
            known = [claim for claim in self.claims() if claim.name == name]
            claims = [claim for claim in known if not _is_off(claim, off)]
            if not claims:
                hint = f"; it is switched off by {DISABLE}={os.environ.get(DISABLE, '')}" if known else ""
                raise UnknownMixer(unknown_name("mixer", name, self.names()) + hint + self._told_failures())
            if len(claims) > 1:
                raise RegistryError(_claimed_twice(claims))
            (claim,) = claims
            self._load(claim.package)
            if claim.package in self._failed:
                raise RegistryError(
                    f"mixer {name!r}: plugin {claim.package!r} ({claim.distribution}) did not load: "
                    f"{self._failed[claim.package][0]}; `zoo plugins --trace` shows where"
                )
            return self._loaded[claim.package][name]

    def plugins(self) -> list[Plugin]:
        """Every plugin with its status; imports those that were not yet."""
        rows = []
        off = switched_off()
        for package in sorted({claim.package for claim in self.claims()}):
            claims = [claim for claim in self.claims() if claim.package == package]
            first = claims[0]
            names = tuple(sorted({claim.name for claim in claims}))
            about = (package, first.distribution, first.version, first.contract, names)
            if all(_is_off(claim, off) for claim in claims):
                rows.append(Plugin(*about, "off", f"switched off by {DISABLE}"))
                continue
            self._load(package)
            twice = [_claimed_twice(both) for name in names if len(both := self._claims_of(name)) > 1]
            if package in self._failed:
                rows.append(Plugin(*about, "failed", *self._failed[package]))
            elif twice:
                rows.append(Plugin(*about, "failed", "; ".join(twice)))
            else:
                rows.append(Plugin(*about, "loaded"))
        return rows

    def _claims_of(self, name: str) -> list[Claim]:
        off = switched_off()
        return [claim for claim in self.claims() if claim.name == name and not _is_off(claim, off)]

    def _load(self, package: str) -> None:
        with self._lock:
            if package in self._loaded or package in self._failed:
                return
            claims = [claim for claim in self.claims() if claim.package == package]
            try:
                self._loaded[package] = _load_plugin(claims)
            except (Exception, SystemExit) as error:  # one plugin's failure is its own
                trace = "" if isinstance(error, RegistryError) else traceback.format_exc()
                reason = str(error) if isinstance(error, MixerError) else f"{type(error).__name__}: {error}"
                self._failed[package] = (reason, trace)

    def _told_failures(self) -> str:
        told = [f"\n  plugin {package!r} did not load: {reason}" for package, (reason, _) in self._failed.items()]
        return "".join(told)


def switched_off() -> set[str]:
    """Distributions, import packages or mixer names that ZOO_DISABLE_PLUGINS lists, comma separated."""
    return {_canonical(word) for word in os.environ.get(DISABLE, "").split(",") if word.strip()}


def contract_problem(contract: str) -> str | None:
    """Why a plugin written for `contract` ("sequence_mixer:v1_2") cannot be served here, or None."""
    major, minor = hookspecs.CONTRACT
    found = re.fullmatch(r"sequence_mixer:v(\d+)_(\d+)", contract)
    if found is None:
        return f"declares the contract {contract!r}; wanted the form sequence_mixer:v{major}_{minor}"
    theirs = int(found[1]), int(found[2])
    if theirs[0] != major or theirs[1] > minor:
        newer = theirs > (major, minor)
        advice = "upgrade mixer-zoo" if newer else "the plugin needs a release for this contract"
        return f"is written for contract v{theirs[0]}.{theirs[1]}, this is v{major}.{minor}; {advice}"
    return None


def _read_claims(found: Iterable[Distribution]) -> Iterable[Claim]:
    seen: set[tuple[str, str, str]] = set()
    for distribution in found:
        entries = distribution.entry_points
        mixers = entries.select(group=MIXERS)
        if not mixers:
            continue
        about = distribution.metadata
        contracts = sorted({entry.value for entry in entries.select(group=CONTRACT)})
        contract = contracts[0] if len(contracts) == 1 else " and ".join(contracts)
        for entry in mixers:
            key = (_canonical(about["Name"]), entry.name, entry.value)
            if key not in seen:  # an editable checkout can be on the path twice
                seen.add(key)
                package = entry.module
                yield Claim(entry.name, package, about["Name"], about["Version"], contract, entry)


def _load_plugin(claims: list[Claim]) -> dict[str, MixerDef]:
    """Import one plugin, call its hook, and hold it to its entry points."""
    first = claims[0]
    if not first.contract:
        raise RegistryError(
            f"the distribution {first.distribution} declares no contract; add an entry point in the group "
            f"'{CONTRACT}': {first.distribution} = \"sequence_mixer:v{hookspecs.CONTRACT[0]}_{hookspecs.CONTRACT[1]}\""
        )
    problem = contract_problem(first.contract)
    if problem is not None:
        raise RegistryError(f"the distribution {first.distribution} {problem}")
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(first.entry.load(), name=first.package)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise RegistryError(f"{error}; the hook is called zoo_register_mixers") from error
    answers = manager.hook.zoo_register_mixers()
    if not answers:
        raise RegistryError(f"{first.package} has no function zoo_register_mixers marked with @hookimpl")
    definitions: dict[str, MixerDef] = {}
    for definition in answers[0]:
        if not isinstance(definition, MixerDef):
            raise RegistryError(f"zoo_register_mixers returned {type(definition).__name__}, wanted MixerDef")
        if definition.name in definitions:
            raise RegistryError(f"zoo_register_mixers returned the name {definition.name!r} twice")
        definitions[definition.name] = definition
    wanted, got = sorted(claim.name for claim in claims), sorted(definitions)
    if wanted != got:
        raise RegistryError(f"the entry points name {', '.join(wanted)}, the hook returned {', '.join(got) or 'none'}")
    return definitions


def _claimed_twice(claims: list[Claim]) -> str:
    owners = " and ".join(f"{claim.distribution} ({claim.package})" for claim in claims)
    return f"the name {claims[0].name!r} is claimed by {owners}; uninstall one, or switch one off with {DISABLE}"


def _canonical(word: str) -> str:
    return re.sub(r"[-_.]+", "-", word.strip()).lower()


def _is_off(claim: Claim, off: set[str]) -> bool:
    return bool(off & {_canonical(claim.distribution), _canonical(claim.package), _canonical(claim.name)})


registry = Registry()


def names() -> list[str]:
    """Names of the registered mixers, sorted; nothing is imported to find them."""
    return registry.names()


def describe(name: str) -> MixerDef:
    """The definition of a mixer. Raises UnknownMixer, RegistryError."""
    return registry.definition(name)

"""The suite on itself: a correct mixer passes every check, each broken one fails the check meant for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from sequence_mixer import MixerDef
from sequence_mixer.conformance import CheckFailed, Report, all_checks, check_mixer
from sequence_mixer.errors import ConfigError, DeviceError, DtypeError, UnknownMixer

from . import flaws_of_mixing, flaws_of_promises
from .flaws import FLAWS, Flaw
from .toys import Mean, MeanConfig, Toy, define

assert flaws_of_mixing  # importing them fills FLAWS
assert flaws_of_promises
CORRECT = {"toy": define(), "toy_mean": define(Mean, config=MeanConfig)}


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return {name: check_mixer(definition, dtypes=("float32", "bfloat16")) for name, definition in CORRECT.items()}


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_mixer_fails_no_check(reports: dict[str, Report], name: str) -> None:
    reports[name].raise_on_failure()


def test_the_correct_mixers_run_almost_every_check(reports: dict[str, Report]) -> None:
    ran = {result.check for report in reports.values() for result in report.results if result.status == "passed"}
    silent = {entry.id for entry in all_checks()} - ran
    assert silent == {"the_matrix_has_the_declared_low_rank", "a_toeplitz_matrix_depends_on_the_distance_only"}


@pytest.mark.parametrize("flaw", FLAWS, ids=lambda flaw: f"{flaw.name}-{flaw.check}")
def test_a_broken_mixer_is_caught_by_the_check_meant_for_it(flaw: Flaw) -> None:
    report = check_mixer(flaw.definition, checks=[flaw.check], examples=["default"])
    failures = list(report.failures())
    assert failures, f"{flaw.name} passed {flaw.check}"
    assert flaw.says in failures[0].message
    assert flaw.definition.name in failures[0].message


def test_every_check_has_a_mixer_that_it_catches() -> None:
    assert {entry.id for entry in all_checks()} == {flaw.check for flaw in FLAWS}


def test_every_check_is_documented_under_its_clause() -> None:
    contract = Path(sys.modules["sequence_mixer"].__file__ or "").parents[1] / "sequence_mixer.md"
    clauses = contract.read_text().split("\n## ")
    for entry in all_checks():
        [section] = [text for text in clauses if text.startswith(f"{entry.clause} ")]
        assert f"`{entry.id}`" in section, f"{entry.id} is not named under {entry.clause}"
        assert entry.summary, entry.id


def test_the_contract_names_no_check_that_does_not_exist() -> None:
    contract = Path(sys.modules["sequence_mixer"].__file__ or "").parents[1] / "sequence_mixer.md"
    known = {entry.id for entry in all_checks()}
    lists = [part for part in contract.read_text().split("\n\n") if part.startswith("Checks: ")]
    named = [word.strip("`.,") for part in lists for word in part.removeprefix("Checks: ").split()]
    assert set(named) == known
    assert len(named) == len(known)


def with_known_failures(**reasons: str) -> MixerDef:
    return define(flaws_of_mixing.KnowsTheLength, known_failures=reasons)


def test_a_known_failure_is_not_a_failure() -> None:
    definition = with_known_failures(a_prefix_gives_the_first_outputs="#1 the length is a feature")
    report = check_mixer(definition, checks=["SM-2"], examples=["default"])
    [known] = [result for result in report.results if result.status == "known_failure"]
    assert "#1" in known.message
    assert report.ok


def test_a_known_failure_that_passes_is_a_failure() -> None:
    definition = with_known_failures(results_repeat_bit_for_bit="#2 atomics")
    report = check_mixer(definition, checks=["results_repeat_bit_for_bit"])
    assert not report.ok
    assert "remove it from known_failures" in report.results[0].message


def test_a_known_failure_that_names_no_check_is_an_error() -> None:
    with pytest.raises(ConfigError, match="outputs_depend_on_earlier_tokens"):
        check_mixer(with_known_failures(outputs_depend_on_earlier_token="#3"))


def test_wrong_arguments_end_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match="no check"):
        check_mixer(define(), checks=["SM-99"])
    with pytest.raises(ConfigError, match="no example 'defualt'"):
        check_mixer(define(), examples=["defualt"])
    with pytest.raises(DtypeError, match="did you mean bfloat16"):
        check_mixer(define(), dtypes=["bfloat"])
    with pytest.raises(UnknownMixer):
        check_mixer("no_such_mixer")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="cuda"):
            check_mixer(define(), device="cuda")


def test_the_report_says_what_ran_and_goes_to_json() -> None:
    steps: list[tuple[int, int, str]] = []
    report = check_mixer(
        define(flaws_of_mixing.MixesNothing),
        checks=["check_outputs_depend_on_earlier_tokens", "SM-12"],
        examples=["default"],
        progress=lambda *step: steps.append(step),
    )
    stored = json.loads(json.dumps(report.to_json()))
    assert not stored["ok"]
    assert {result["clause"] for result in stored["results"]} == {"SM-2", "SM-12"}
    assert steps[0][:2] == (0, len(report.results))
    assert steps[-1][:2] == (len(report.results), len(report.results))
    with pytest.raises(
        CheckFailed, match=r"SM-2 outputs_depend_on_earlier_tokens \[default, float64\]: toy: no output"
    ):
        report.raise_on_failure()


def test_a_report_of_nothing_is_not_ok() -> None:
    with pytest.raises(CheckFailed, match="no check ran"):
        check_mixer(define(Toy), checks=["SM-6"], examples=[]).raise_on_failure()


def test_an_exception_of_the_mixer_is_a_failure_with_its_place() -> None:
    class Raises(Toy):
        def finish(self, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            raise ZeroDivisionError("no reason")

    report = check_mixer(define(Raises), checks=["SM-9"], examples=["default"])
    assert not report.ok
    assert "ZeroDivisionError: no reason" in report.results[0].message
    assert "test_suite.py" in report.results[0].message


def test_checks_leave_the_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_mixer(define(flaws_of_promises.AddsNoise), checks=["SM-9"], examples=["default"])
    assert bool((torch.get_rng_state() == before).all())
    assert not torch.are_deterministic_algorithms_enabled()

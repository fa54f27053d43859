"""The suite as pytest tests: ids, strict known failures, skips, and names that do not resolve."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from sequence_mixer.conformance import parametrize_with_mixer_checks

from .toys import define

pytest_plugins = ["pytester"]


def test_ids_name_mixer_example_and_check() -> None:
    mark = parametrize_with_mixer_checks([define()], checks=["SM-2", "SM-8"]).mark
    ids = [parameter.id for parameter in mark.args[1]]
    assert "toy-default-later_tokens_leave_earlier_outputs_alone" in ids
    assert "toy-one_group-backends_agree_with_the_float64_reference-float32" in ids


@parametrize_with_mixer_checks([define()], checks=["SM-4", "SM-14"], examples=["one_group"])
def test_the_decorator_runs_checks(check) -> None:  # type: ignore[no-untyped-def]
    check()


def test_outcomes_under_pytest(pytester: pytest.Pytester) -> None:
    here = Path(__file__).resolve().parents[1]
    pytester.makepyfile(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(here)!r})
        from conformance.flaws_of_mixing import KnowsTheLength
        from conformance.toys import Mean, MeanConfig, define
        from sequence_mixer.conformance import parametrize_with_mixer_checks

        known = {{"a_prefix_gives_the_first_outputs": "#1", "outputs_depend_on_earlier_tokens": "#2"}}
        broken = define(KnowsTheLength, known_failures=known)
        mean = define(Mean, config=MeanConfig)

        @parametrize_with_mixer_checks(
            [broken, mean, "no_such_mixer"],
            checks=[
                "a_prefix_gives_the_first_outputs",
                "outputs_depend_on_earlier_tokens",
                "backends_agree_in_float64",
            ],
            examples=["default"],
        )
        def test_conformance(check):
            check()
        """)
    )
    result = pytester.runpytest_subprocess("-rA", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=2, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines(["*no_such_mixer-does_not_load*", "*UnknownMixer*"])

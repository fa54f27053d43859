"""The suite under pytest: one test per mixer, example and check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sequence_mixer.conformance.catalogue import CheckSkipped
from sequence_mixer.conformance.suite import Task, plan
from sequence_mixer.definition import MixerDef
from sequence_mixer.errors import MixerError
from sequence_mixer.host import host


def parametrize_with_mixer_checks(
    mixers: Sequence[str | MixerDef],
    *,
    device: str = "cpu",
    dtypes: Sequence[str] = ("float32",),
    checks: Sequence[str] | None = None,
    examples: Sequence[str] | None = None,
) -> Any:
    """Decorator of a test `def test_conformance(check): check()`; arguments as in `check_mixer`.

    mixers: registered names or definitions. Ids read `ssd-default-later_tokens_leave_earlier_outputs_alone`. A known
    failure is a strict xfail. A name that does not resolve becomes one failing test, so that the rest still runs.
    """
    import pytest

    parameters = []
    for mixer in mixers:
        name = mixer if isinstance(mixer, str) else mixer.name
        try:
            definition = host().definition(mixer) if isinstance(mixer, str) else mixer
            tasks = list(plan(definition, device=device, dtypes=dtypes, checks=checks, examples=examples))
        except MixerError as error:
            parameters.append(pytest.param(_raises(error), id=f"{name}-does_not_load"))
            continue
        for task in tasks:
            marks = [] if task.known is None else [pytest.mark.xfail(strict=True, reason=task.known)]
            parameters.append(pytest.param(_runs(task), id=task.id, marks=marks))
    return pytest.mark.parametrize("check", parameters)


def _runs(task: Task) -> Callable[[], None]:
    def run() -> None:
        import pytest

        try:
            task.run()
        except CheckSkipped as reason:
            pytest.skip(str(reason))

    return run


def _raises(error: MixerError) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run

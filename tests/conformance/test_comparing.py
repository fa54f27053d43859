"""How a small tensor is judged: by the errors of several draws together, and only where one of them fails."""

from __future__ import annotations

import pytest
import torch

from sequence_mixer.conformance import CheckFailed
from sequence_mixer.conformance.comparing import DRAWS, Draw, agree
from sequence_mixer.conformance.probes import Subject

from .toys import define

ERROR = 1e-5  # of the plain path, relative


def subject() -> Subject:
    definition = define()
    return Subject(definition, "default", definition.example("default"), torch.device("cpu"), torch.float32)


def draw(seed: int, ratio: float, elements: int = 8) -> Draw:
    """A tensor whose error is `ratio` times that of the plain path; the other one is exact."""
    source = torch.Generator().manual_seed(seed)
    exact = torch.randn(elements, generator=source, dtype=torch.float64)
    error = ERROR * exact.square().mean().sqrt() * torch.ones(elements, dtype=torch.float64)
    other = torch.ones(4, dtype=torch.float64)
    return (
        {"output": exact + ratio * error, "other": other},
        {"output": exact, "other": other},
        {"output": exact + error, "other": other},
    )


def judged(ratios: list[float], elements: int = 8) -> list[int]:
    """The seeds that were drawn to judge a tensor with these ratios of errors, in order."""
    asked: list[int] = []

    def again(seed: int) -> Draw:
        asked.append(seed)
        return draw(seed, ratios[seed], elements)

    agree(subject(), "a way", *draw(0, ratios[0], elements), again=again)
    return asked


def test_a_tensor_within_its_allowance_is_drawn_once() -> None:
    assert judged([1.9]) == []


def test_one_unlucky_draw_of_a_small_tensor_is_no_failure() -> None:
    assert judged([3.0] + [1.0] * (DRAWS - 1)) == list(range(1, DRAWS))


def test_a_draw_in_which_the_tensor_cancels_does_not_decide() -> None:
    """Its values are a hundredth of those of the other draws, its errors are as large."""

    def cancelled(seed: int) -> Draw:
        got, exact, plain = draw(seed, 3.0 if seed == 0 else 1.0)
        if seed > 0:
            return got, exact, plain
        got, plain, exact = ({name: part[name] - 0.99 * exact[name] for name in exact} for part in (got, plain, exact))
        return got, exact, plain

    agree(subject(), "a way", *cancelled(0), again=cancelled)


def test_a_small_tensor_that_errs_in_every_draw_fails() -> None:
    with pytest.raises(CheckFailed, match="output differs"):
        judged([2.2] * DRAWS)


def test_a_large_tensor_is_judged_at_once() -> None:
    with pytest.raises(CheckFailed, match="output differs"):
        judged([3.0] + [1.0] * (DRAWS - 1), elements=1000)


def test_nan_never_passes() -> None:
    with pytest.raises(CheckFailed, match="nan"):
        judged([float("nan")] + [1.0] * (DRAWS - 1))

"""From which length on one curve stays below another."""

import pytest
from zoo.bench.crossover import crossover, curves, told_crossover

QUADRATIC = {length: length**2 / 1000 for length in (128, 256, 512, 1024)}


def test_a_constant_crosses_a_power_where_algebra_says() -> None:
    flat = dict.fromkeys(QUADRATIC, 90.0)  # T^2 / 1000 = 90 at T = 300: log-log interpolation is exact for powers
    assert crossover(flat, QUADRATIC) == pytest.approx(300)
    assert told_crossover(flat, QUADRATIC) == "300"


def test_a_curve_that_is_below_everywhere_or_never() -> None:
    assert told_crossover(dict.fromkeys(QUADRATIC, 1.0), QUADRATIC) == "<= 128"
    assert told_crossover(dict.fromkeys(QUADRATIC, 1e6), QUADRATIC) == "> 1024"
    assert crossover(QUADRATIC, QUADRATIC) is None


def test_only_the_last_crossing_counts() -> None:
    wavy = {128: 1.0, 256: 1e3, 512: 1.0, 1024: 1.0}
    assert 256 < (crossover(wavy, QUADRATIC) or 0) < 512
    assert crossover({128: 1.0, 256: 1.0, 512: 1.0, 1024: 1e6}, QUADRATIC) is None


def test_a_touch_at_a_measured_length_is_the_crossover() -> None:
    assert crossover({128: 1e3, 256: QUADRATIC[256], 512: 1.0}, QUADRATIC) == pytest.approx(256)


def test_lengths_that_only_one_has_are_left_out() -> None:
    assert told_crossover({64: 1.0}, QUADRATIC) == "-"
    assert told_crossover({256: 1e6, 4096: 1.0}, QUADRATIC) == "> 256"


def test_curves_are_medians_in_rising_order_of_what_was_measured() -> None:
    rows = {
        "b": {"mixer": "m", "kind": "forward", "length": 256, "samples_ms": [5.0, 1.0, 3.0]},
        "a": {"mixer": "m", "kind": "forward", "length": 128, "samples_ms": [2.0, 4.0]},
        "c": {"mixer": "m", "kind": "decode", "length": 128, "samples_ms": [9.0]},
        "d": {"mixer": "m", "kind": "forward", "length": 512, "outcome": "skipped"},
    }
    assert curves(rows, "forward") == {"m": {128: 3.0, 256: 3.0}}
    assert list(curves(rows, "forward")["m"]) == [128, 256]

"""Tables that fit a terminal and pictures that show every mixer."""

import io
import itertools
from typing import Any

import matplotlib.image
import pytest
from rich.console import Console
from zoo.bench import picture, tables
from zoo.bench.tables import scaled

LENGTHS = (128, 1024, 4096)
NAMES = ("attention", "linear_attention", *(f"mixer_{index}" for index in range(11)))


def measured(name: str, kind: str, length: int, ms: float, **more: Any) -> dict[str, Any]:
    return {
        "mixer": name, "kind": kind, "length": length, "outcome": "done", "samples_ms": [ms, 2 * ms, ms / 2],
        "causal": True, **more,
    }  # fmt: skip


def many_rows() -> dict[str, dict[str, Any]]:
    """A baseline that is linear in T, twelve that are flat, each at its own height, and one of every mishap."""
    rows: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(NAMES):
        for length in LENGTHS:
            ms = length / 10 if index == 0 else 20.0 * index
            rows[f"{name} | forward | {length}"] = measured(name, "forward", length, ms, flops=10**9, bytes=2**22)
            rows[f"{name} | train step | {length}"] = measured(name, "train step", length, 3 * ms, peak_bytes=2**30)
            rows[f"{name} | decode | {length}"] = measured(name, "decode", length, 0.1234, state_bytes=1536)
        rows[f"{name} | conformance"] = {
            "mixer": name, "kind": "conformance", "outcome": "done", "verdict": "green", "failures": {},
        }  # fmt: skip
        rows[f"{name} | smoke run"] = {"mixer": name, "kind": "smoke run", "outcome": "done", "bits_per_byte": 3.14159}
    rows["mixer_1 | conformance"] |= {"verdict": "red", "failures": {"some_check": "mixer_1: off [by] 3\nmore"}}
    rows["mixer_2 | conformance"] |= {"verdict": "green so far", "ran": 41, "of": 72}
    for length in LENGTHS[1:]:
        rows[f"mixer_3 | forward | {length}"] = {
            "mixer": "mixer_3", "kind": "forward", "length": length, "outcome": "skipped", "reason": f"{length} s"
        }  # fmt: skip
        rows[f"mixer_4 | decode | {length}"] = {
            "mixer": "mixer_4", "kind": "decode", "length": length, "outcome": "failed", "error": "ValueError: no"
        }  # fmt: skip
    del rows["mixer_5 | smoke run"]["bits_per_byte"]
    rows["mixer_5 | smoke run"] |= {"reason": "cannot be causal"}
    rows["mixer_5 | forward | 128"]["causal"] = False
    rows["mixer_6 | smoke run"]["causal_by_option"] = True
    del rows["mixer_7 | smoke run"]["bits_per_byte"]
    rows["mixer_7 | smoke run"]["bits_per_masked_byte"] = 2.71828
    rows["gone | build"] = {"mixer": "gone", "kind": "build", "outcome": "failed", "error": "RegistryError: no torch"}
    return rows


def printed(*what: Any, width: int) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    for each in what:
        console.print(each)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_both_tables_fit_and_break_no_name(width: int) -> None:
    text = printed(
        tables.details(many_rows(), "attention", 4096), tables.summary(many_rows(), "attention"), width=width
    )
    assert max(len(line) for line in text.splitlines()) <= width
    for name in NAMES:
        assert text.count(name) >= 2, name
    assert "…" not in text


def test_the_summary_marks_what_is_not_green_and_tells_crossovers() -> None:
    lines = printed(tables.summary(many_rows(), "attention"), width=100).splitlines()

    def cells(name: str) -> list[str]:
        (line,) = [line for line in lines if line.startswith(name + " ")]
        return line.split()

    assert cells("linear_attention") == ["linear_attention", "the", "past", "green", "3.142", "200", "200", ">", "4096"]
    assert "RED" in cells("mixer_1")
    assert "41/72" in cells("mixer_2")
    assert cells("mixer_5")[1:3] == ["both", "sides"]
    assert "3.142*" in cells("mixer_6")
    assert "2.718" in cells("mixer_7")
    (after,) = [later for line, later in itertools.pairwise(lines) if line.startswith("mixer_7 ")]
    assert after.split() == ["masked"]  # no bits per byte, and right below the number
    assert sum("masked" in line for line in lines) == 1
    assert "failed" in cells("gone")


def test_details_have_times_memory_and_the_cost_model_beside_them() -> None:
    text = printed(tables.details(many_rows(), "attention", 4096), width=80)
    block = text[text.index("linear_attention") :].splitlines()
    assert block[1].split() == ["128", "20.0", "60.0", "0.123", "1024", "1.50", "1.00", "50.0", "4.00", "0.210"]
    assert "no time" in text[text.index("mixer_3") : text.index("mixer_4")]
    assert "failed" in text[text.index("mixer_4") : text.index("mixer_5")]
    assert "RED" in text[text.index("mixer_1") : text.index("mixer_2")]


def test_notes_give_the_reasons() -> None:
    lines = tables.notes(many_rows(), "attention")
    assert "mixer_1: red: some_check: mixer_1: off [by] 3" in lines
    assert "mixer_3: no time for forward at T = 1024, 4096; run it again, or with more --minutes" in lines
    assert "mixer_4: failed: decode at T = 1024, 4096: ValueError: no" in lines
    assert "mixer_5: no smoke run: cannot be causal" in lines
    assert "mixer_6: trained with causal=True, measured without" in lines
    assert "mixer_7: trained on masked bytes; its number is bits per masked byte, not bits per byte" in lines
    assert sum("masked" in line for line in lines) == 1
    assert "gone: failed: build: RegistryError: no torch" in lines
    assert "mixer_5: every token sees both sides, while attention is causal here" in lines


@pytest.mark.parametrize(
    ("value", "told"),
    [(None, "-"), (0, "0"), (1234567, "1234567"), (99.96, "100.0"), (1.5, "1.50"), (0.0123, "0.012"), (1e-6, "0.000")],
)
def test_numbers_have_three_digits_and_no_exponent(value: float | None, told: str) -> None:
    assert scaled(value, 1.0) == told


@pytest.mark.parametrize("kept", [NAMES, NAMES[:1], NAMES[1:3], ()])
def test_a_picture_is_drawn_of_many_mixers_of_one_and_of_none(kept: tuple[str, ...]) -> None:
    rows = {key: row for key, row in many_rows().items() if row["mixer"] in kept}
    image = matplotlib.image.imread(io.BytesIO(picture.draw(rows, "attention", "a title [with] $signs")))
    height, width = image.shape[:2]
    assert width > 1500
    assert height > 500
    assert image[..., :3].std() > 0.02  # something is drawn


def test_each_mixer_has_its_own_colour_marker_and_dash() -> None:
    styles = {
        (
            picture.COLOURS[index % len(picture.COLOURS)],
            picture.MARKERS[index % len(picture.MARKERS)],
            picture.DASHES[index // len(picture.COLOURS) % len(picture.DASHES)],
        )
        for index in range(27)
    }
    assert len(styles) == 27

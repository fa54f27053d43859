"""The result file: gone on with, set aside, or refused; never lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from zoo.bench.store import DONE, FAILED, SKIPPED, Results

from sequence_mixer.errors import ConfigError

ABOUT = {"device": "a", "sizes": {"lengths": (1, 2)}}


def row(outcome: str = DONE, **more: Any) -> dict[str, Any]:
    return {"mixer": "m", "kind": "forward", "outcome": outcome, **more}


@pytest.fixture
def first(tmp_path: Path) -> Results:
    """Results in tmp_path/out with a row of each outcome."""
    results, word = Results.open(tmp_path / "out", ABOUT)
    assert word == ""
    results.add("a", row(samples_ms=[1.5, 2.5]))
    results.add("b", row(SKIPPED, reason="no time"))
    results.add("c", row(FAILED, error="boom"))
    results.close()
    return results


def test_what_is_done_stays_and_the_rest_is_tried_again(first: Results) -> None:
    again, word = Results.open(first.folder, ABOUT)
    assert again.rows == {"a": first.rows["a"]}
    assert [again.done(key) for key in "abcd"] == [True, False, False, False]
    assert word.startswith("going on with 1 measurements in ")
    assert "2 that were skipped or failed" in word


@pytest.mark.parametrize(
    ("about", "fresh", "why"),
    [({**ABOUT, "device": "b"}, False, "changed: device, run"), (ABOUT, True, "--fresh")],
)
def test_other_results_are_set_aside_each_time(first: Results, about: dict[str, Any], fresh: bool, why: str) -> None:
    before = first.path.read_bytes()
    first.picture.write_bytes(b"picture")
    for number in (1, 2):
        results, word = Results.open(first.folder, {**about, "run": number}, fresh=fresh)
        assert (why if number == 1 or fresh else "changed: run") in word
        assert results.rows == {}
        results.add("z", row())
        results.close()
    assert (first.folder / "results.before-1.json").read_bytes() == before
    assert (first.folder / "results.before-1.png").read_bytes() == b"picture"
    assert list(json.loads((first.folder / "results.before-2.json").read_text())["rows"]) == ["z"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is damaged"),
        ('{"format": 2, "about": {}, "rows": {"a"', "is damaged"),
        ("[1, 2]", "is damaged"),
        ('{"format": 2, "about": {}, "rows": {"a": {"mixer": "m"}}}', "is damaged"),
        ('{"format": 1, "about": {}, "rows": {}}', "has format 1, this version writes 2"),
    ],
)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_file_that_is_not_ours_is_refused_and_left_alone(
    tmp_path: Path, content: str, told: str, fresh: bool
) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ConfigError, match=told):
        Results.open(tmp_path, ABOUT, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == content


def test_a_picture_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.png").write_text("mine")
    with pytest.raises(ConfigError, match="would be overwritten"):
        Results.open(tmp_path, ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["results.png"]


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    results, _ = Results.open(tmp_path, ABOUT)
    with pytest.raises(ConfigError, match="another process is measuring"):
        Results.open(tmp_path, ABOUT)
    results.close()
    Results.open(tmp_path, ABOUT)[0].close()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="cannot write in"):
            Results.open(folder, ABOUT)
    assert (tmp_path / "file").read_text() == "mine"

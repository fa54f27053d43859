"""`zoo bench` from end to end at tiny sizes: every kind of mixer, interruptions, too little time, mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from zoo.bench import cases, run
from zoo.bench.cases import Sizes
from zoo.bench.conformance import conformance_row
from zoo.bench.store import DONE, FAILED, SKIPPED, Results
from zoo.cli import app, main

from installed_mixers import only_bench_mixers  # noqa: F401

pytestmark = pytest.mark.usefixtures("only_bench_mixers")

TINY = Sizes(64, (4, 8, 16), 16, 1, 0.01, 2, 16, 32)
OFTEN = ("--baseline", "bench_plain", "--no-check", "--no-train")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tiny sizes, no slow mixer unless it is named, a fresh working directory."""
    monkeypatch.setattr(cases, "CPU_SIZES", TINY)
    monkeypatch.setenv("ZOO_DISABLE_PLUGINS", "mixer-zoo,bench_slow")
    monkeypatch.chdir(tmp_path)


def bench(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["bench", "--device", "cpu", *arguments])
    assert done.exit_code == code, done.output + repr(done.exception)
    return done.output


def stored(folder: str = "bench-out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "results.json").read_text())
    return found


def test_a_run_over_the_registry_marks_what_is_amiss_and_measures_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "conformance_row", lambda name, device, seconds: conformance_row(name, device, 0.2))
    output = bench("--baseline", "bench_plain", "--minutes", "0")
    file, picture = stored(), Path("bench-out/results.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    about, rows = file["about"], file["rows"]
    assert about["sizes"]["lengths"] == [4, 8, 16]
    assert about["torch"] == torch.__version__
    assert about["distributions"]["bench-mixers"] == "1.0"
    assert about["device"]
    assert "commit" in about
    plain = {key: row for key, row in rows.items() if row["mixer"] == "bench_plain"}
    assert set(plain) == {
        "bench_plain | conformance", "bench_plain | smoke run",
        *(f"bench_plain | {kind} | {length}" for kind in cases.KINDS for length in (4, 8, 16)),
    }  # fmt: skip
    forward = rows["bench_plain | forward | 16"]
    assert len(forward["samples_ms"]) >= 1
    assert (forward["batch"], forward["flops"]) == (1, 4 * 16 * 64**2)
    assert rows["bench_plain | train step | 16"]["peak_bytes"] > 16 * 64 * 4
    assert rows["bench_plain | decode | 16"]["state_bytes"] == 64 * 4
    assert 0 < rows["bench_plain | smoke run"]["bits_per_byte"] < 10
    assert len(rows["bench_plain | smoke run"]["losses"]) == 2

    assert not [key for key in rows if key.startswith("bench_both_sides | decode")]
    assert rows["bench_both_sides | smoke run"]["causal_by_option"]
    masked = rows["bench_never_causal | smoke run"]
    assert 0 < masked["bits_per_masked_byte"] < 10
    assert "bits_per_byte" not in masked
    assert not masked["causal_by_option"]
    assert len(masked["losses"]) == 2
    told = " ".join(output.split())
    assert "bench_never_causal: trained on masked bytes; its number is bits per masked byte, not bits per byte" in told
    assert rows["bench_limited | forward | 16"]["config"]["max_length"] == 16
    assert rows["bench_limited | decode | 16"]["outcome"] == DONE

    assert rows["bench_raises | forward | 8"]["outcome"] == DONE
    for kind in cases.KINDS:
        raised = rows[f"bench_raises | {kind} | 16"]
        assert raised["outcome"] == FAILED
        assert raised["error"] == "ValueError: more than eight"
        assert "Traceback" in raised["trace"]
    assert rows["bench_unbuildable | build"]["outcome"] == FAILED
    assert "bench_raises: failed: smoke run; forward at T = 16" in output
    assert "bench_unbuildable: failed: build: ConfigError" in output
    assert rows["bench_raises | conformance"]["verdict"] == "red"
    assert "RED" in output
    assert "Traceback" not in output


def test_an_interrupted_run_goes_on_and_measures_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("bench_plain", "bench_both_sides", "bench_raises")
    measured: list[str] = []
    measure = run.case_row

    def stops(case: Any, *more: Any) -> Any:
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(case.key)
        return measure(case, *more)

    monkeypatch.setattr(run, "case_row", stops)
    assert "the same command goes on" in bench(*names, *OFTEN, code=130)
    before = stored()["rows"]
    assert list(before) == measured

    def counts(case: Any, *more: Any) -> Any:
        measured.append(case.key)
        return measure(case, *more)

    monkeypatch.setattr(run, "case_row", counts)
    assert "going on with 4 measurements" in bench(*names, *OFTEN)
    after = stored()["rows"]
    assert {key: after[key] for key in before} == before
    assert len(measured) == len(set(measured)) == len(after) == 9 + 6 + 9
    failed = [key for key, row in after.items() if row["outcome"] == FAILED]
    assert failed == [f"bench_raises | {kind} | 16" for kind in cases.KINDS]
    bench(*names, *OFTEN)
    assert measured[24:] == failed  # what failed is tried again, and nothing else


def test_kill_9_loses_at_most_the_measurement_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_DISABLE_PLUGINS", "mixer-zoo")
    command = ["bench", "bench_slow", *OFTEN, "--length", "4", "--length", "8", "--d-model", "64", "--device", "cpu"]
    start = [sys.executable, "-m", "zoo", *command]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    file = Path("bench-out/results.json")
    deadline = time.monotonic() + 240
    while not file.exists() or len(stored()["rows"]) < 2:
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = stored()["rows"]
    done = subprocess.run(start, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on with" in done.stdout
    after = stored()["rows"]
    assert {key: after[key] for key in before} == before
    assert len(after) == 6


def test_a_run_keeps_to_its_time_and_says_what_it_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_DISABLE_PLUGINS", "mixer-zoo")
    begun = time.monotonic()
    output = bench("bench_slow", "--baseline", "bench_plain", "--minutes", "0.02")  # 1.2 s; a call takes 0.1
    assert time.monotonic() - begun < 60
    rows = stored()["rows"]
    assert len(rows) == 2 + 9
    skipped = {key: row for key, row in rows.items() if row["outcome"] == SKIPPED}
    assert skipped
    assert all(row["reason"] for row in skipped.values())
    assert "bench_slow: no time for" in output
    again = bench("bench_slow", "--baseline", "bench_plain", "--minutes", "0", "--no-check", "--no-train")
    assert f"{len(skipped)} that were skipped or failed are tried again" in again
    assert len(stored()["rows"]["bench_slow | forward | 16"]["samples_ms"]) >= 1


def test_a_smoke_run_that_would_take_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.bench.smoke import smoke_run

    monkeypatch.setenv("ZOO_DISABLE_PLUGINS", "mixer-zoo")
    sizes = Sizes(64, (4,), 16, 1, 0.01, 100, 16, 32)
    begun = time.monotonic()
    row = smoke_run("bench_slow", sizes, torch.device("cpu"), limit=10.0)
    assert row["outcome"] == SKIPPED
    assert "100 steps take" in row["reason"]
    assert smoke_run("bench_slow", sizes, torch.device("cpu"), limit=0.0)["reason"] == "the time of the run is up"
    assert time.monotonic() - begun < 60


def test_sizes_of_the_user_are_measured_and_other_results_kept() -> None:
    bench("bench_plain", *OFTEN)
    output = bench("bench_plain", *OFTEN, "--length", "32", "--length", "4", "--length", "4", "--d-model", "128")
    assert "changed: sizes" in output
    about = stored()["about"]
    assert (about["sizes"]["lengths"], about["sizes"]["d_model"], about["sizes"]["tokens"]) == ([4, 32], 128, 32)
    assert Path("bench-out/results.before-1.json").exists()
    assert Path("bench-out/results.before-1.png").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bench_plane"], "did you mean bench_plain?"),
        (["--baseline", "bench_plane"], "did you mean bench_plain?"),
        (["--dtype", "float12"], "no dtype 'float12'"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--d-model", "48", "bench_unbuildable"], "d_model=48"),
        (["--out", "file"], "cannot write in file"),
        (["--out", "broken"], "is damaged or no result file"),
    ],
)
def test_mistakes_end_in_one_message_and_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    Path("file").write_text("mine")
    Path("broken").mkdir()
    Path("broken/results.json").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["zoo", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert told in errors
    assert errors.count("error:") == 1
    assert "Traceback" not in errors
    assert not Path("bench-out").exists()
    assert Path("file").read_text() == Path("broken/results.json").read_text() == "mine"


def test_a_folder_is_let_go_of_when_a_run_ends() -> None:
    bench("bench_plain", *OFTEN)
    results, _ = Results.open(Path("bench-out"), {})
    results.close()

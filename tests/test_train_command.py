"""`zoo train` as a command: runs that are killed, resumed, or wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from installed_mixers import small  # noqa: F401
from training_runs import CONFIG, TEXT, assert_equal_runs

pytestmark = pytest.mark.usefixtures("small")


class TestCommand:
    """`zoo train` and `zoo generate` as a user runs them."""

    def test_kill_9_at_any_moment_and_a_rerun_give_the_same_numbers(self, tmp_path: Path) -> None:
        arguments = self.arguments(tmp_path)
        self.run(tmp_path, *arguments, "--out", "straight")
        kills = 0
        for steps in (3, 17, 18, 40):
            process = subprocess.Popen(
                command(*arguments, "--out", "killed"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            wait_for_steps(tmp_path / "killed" / "metrics.jsonl", steps, process)
            os.kill(process.pid, signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
            process.stdout.close()  # type: ignore[union-attr]
        assert kills == 4
        done = self.run(tmp_path, *arguments, "--out", "killed")
        assert "going on from step" in done.stdout
        assert_equal_runs(tmp_path / "straight", tmp_path / "killed")
        results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("straight", "killed")]
        assert results[0]["bits_per_byte"] == results[1]["bits_per_byte"]
        assert results[1]["resumed_from"] >= 38

    def test_text_is_generated_from_a_run(self, tmp_path: Path) -> None:
        self.run(tmp_path, *self.arguments(tmp_path), "--out", "run", "--steps", "4")
        asked = ("generate", "run", "--prompt", "import é", "--tokens", "40", "--seed", "2")
        first = self.run(tmp_path, *asked).stdout
        assert first.startswith("import é")
        assert first == self.run(tmp_path, *asked).stdout
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", first)

    @pytest.mark.parametrize(
        ("change", "more", "told"),
        [
            ("layers:", ["--steps", "0"], "steps=0"),
            ('"small_decay*2"|"small_deacy*2"', [], "did you mean small_decay?"),
            ("context: 32|contxt: 32", [], "did you mean context?"),
            ("context: 32|context: [32", [], "a.yaml, line"),
            ("layers:", ["--device", "gpu"], "device='gpu'"),
            ("layers:", ["--dtype", "float16"], "dtype='float16'"),
            ("layers:", ["--corpus", "absent"], "no corpus at absent"),
            ("layers:", ["--resume"], "has no checkpoint"),
        ],
    )
    def test_mistakes_end_in_one_message_and_exit_2(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        change: str,
        more: list[str],
        told: str,
    ) -> None:
        from zoo.cli import main

        old, _, new = change.partition("|")
        (tmp_path / "a.yaml").write_text(CONFIG.replace(old, new or old))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["zoo", "train", "a.yaml", "--out", "run", *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def arguments(self, folder: Path) -> tuple[str, ...]:
        (folder / "a.yaml").write_text(CONFIG)
        return "train", "a.yaml", "--corpus", TEXT

    def run(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "zoo", *arguments]  # PYTHONPATH is set by the fixture


def wait_for_steps(metrics: Path, steps: int, process: subprocess.Popen[bytes]) -> None:
    """Until the metrics have that many lines."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= steps:
            return
        assert process.poll() is None, process.stdout.read().decode() if process.stdout else ""
        time.sleep(0.002)
    raise AssertionError(f"{metrics} has not reached {steps} lines in a minute")

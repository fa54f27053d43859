"""`pytest benchmarks` times the cases of every registered mixer and stores what they were measured on."""

import json
import os
import subprocess
import sys
from pathlib import Path

from zoo.registry import registry

ROOT = Path(__file__).resolve().parents[2]


def test_times_are_stored_with_the_machine_and_the_cost_model(tmp_path: Path) -> None:
    one, *others = registry.names()
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of pytest-xdist
    environment = {
        **outside, "ZOO_DISABLE_PLUGINS": ",".join(others), "ZOO_BENCH_LENGTHS": "16,32", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "--benchmark-json",
         str(tmp_path / "times.json")],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks = json.loads((tmp_path / "times.json").read_text())["benchmarks"]
    assert {benchmark["extra_info"]["length"] for benchmark in benchmarks} == {16, 32}
    assert {"forward", "train step"} <= {benchmark["extra_info"]["kind"] for benchmark in benchmarks}
    for benchmark in benchmarks:
        about = benchmark["extra_info"]
        assert about["mixer"] == one
        assert about["conformance"].startswith("green")
        assert about["forward_flops"] > 0
        for word in ("device", "torch", "commit", "dtype", "batch", "d_model", "backend", "state_bytes"):
            assert word in about, word
        assert len(benchmark["stats"]["data"]) >= 5

"""`make gpu-test`: kernel tests, conformance, backends and a benchmark smoke on a CUDA device, in one go.

Runs from a checkout with whatever python holds torch; nothing needs to be installed (PYTHONPATH is set here). Tests
run in parallel processes: most of their time is compilation. Writes JSON and logs to $OUT, or to
benchmarks/results/<device>/ without it; steps that were not run keep what gpu_test.json says of them. Exits non-zero
if anything is red.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("kernels", "conformance", "backends", "bench")
TOLD = 600  # characters of a step's log that are printed
SHOWN = 40  # failures


def environment() -> dict[str, str]:
    """The environment in which the checkout is importable and its entry points are found."""
    sys.path[:0] = [str(ROOT), str(ROOT / "specs"), str(ROOT / "plugins")]
    paths = [str(ROOT), str(ROOT / "specs"), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]
    own = {"ZOO_TEST_DEVICE": "cuda", "ZOO_TEST_DTYPES": "float32,bfloat16", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def write_entry_points() -> None:
    """A dist-info folder beside the packages, so that the registry works without an install."""
    import tomllib
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("mixer-zoo")
        return
    except PackageNotFoundError:
        pass
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = ROOT / f"mixer_zoo-{project['version']}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mixer-zoo\nVersion: {project['version']}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def outcomes(report: Path) -> dict[str, Any]:
    """Counts of a step's tests, in all and by mixer and dtype, and the end of every failure's message."""
    counts: dict[str, Counter[str]] = {}
    failures = {}
    for line in report.read_text().splitlines():
        found = json.loads(line)
        inside = re.search(r"\[(\w+)-.*?(-float32|-bfloat16|-float16)?\]$", found["test"])
        groups = ["all"]
        if inside and "test_conformance[" in found["test"]:
            groups.append(f"{inside[1]} {(inside[2] or '-float64')[1:]}")
        for group in groups:
            counts.setdefault(group, Counter())[found["outcome"]] += 1
        if found["outcome"] == "failed":
            failures[found["test"]] = found["message"]
    return {"counts": {group: dict(found) for group, found in sorted(counts.items())}, "failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=STEPS, help="steps to run; all by default")
    parser.add_argument("--select", help="pytest -k expression for the two test steps")
    parser.add_argument("--workers", type=int, default=max(2, (os.cpu_count() or 4) - 2))
    parser.add_argument("--limit", type=int, default=1800, help="seconds that one step may take")
    options = parser.parse_args()
    env = environment()
    write_entry_points()

    import torch

    if not torch.cuda.is_available():
        print("make gpu-test needs a CUDA device; none is visible")
        return 2
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / device)
    out.mkdir(parents=True, exist_ok=True)
    test = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:benchmark", "--tb=short"]
    test += ["-p", "benchmarks.outcomes"]
    test += ["-n", str(options.workers), "--max-worker-restart=100"]
    test += ["-k", options.select] if options.select else []
    steps = {
        "kernels": [*test, "tests/kernels"],
        "conformance": [*test, "tests/test_conformance_mixers.py"],
        "backends": [sys.executable, "benchmarks/compare_backends.py", "--out", str(out / "backends.json")],
        "bench": [sys.executable, "-m", "zoo", "bench", "--device", "cuda", "--length", "1024", "--length", "4096",
                  "--length", "16384", "--out", str(out / "bench"), "--no-check", "--no-train"],
    }  # fmt: skip
    stored = out / "gpu_test.json"
    outcome: dict[str, Any] = json.loads(stored.read_text())["steps"] if stored.exists() else {}
    wanted = options.only or STEPS
    for name in wanted:
        start = time.time()
        log_file, report = out / f"{name}.log", out / f"{name}.jsonl"
        with log_file.open("w") as log:
            try:
                code = subprocess.run(
                    steps[name], cwd=ROOT, env=env | {"ZOO_TEST_OUTCOMES": str(report)}, stdout=log,
                    stderr=subprocess.STDOUT, timeout=options.limit,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = 124
        outcome[name] = {"exit": code, "seconds": round(time.time() - start, 1)}
        if report.exists():
            outcome[name] |= outcomes(report)
            report.unlink()
        print(f"== {name}: exit {code} after {outcome[name]['seconds']} s\n{log_file.read_text()[-TOLD:]}", flush=True)
        for test, message in list(outcome[name].get("failures", {}).items())[:SHOWN]:
            print(f"{test}: {' '.join(message.split())[-200:]}")
        stored.write_text(json.dumps({"device": device, "steps": outcome}, indent=1))
    return 0 if all(outcome[name]["exit"] == 0 for name in wanted) else 1


if __name__ == "__main__":
    raise SystemExit(main())

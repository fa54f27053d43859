"""`make gpu-test`: kernel tests, conformance and a benchmark smoke on a CUDA device, in one go.

Runs from a checkout with whatever python holds torch; nothing needs to be installed (PYTHONPATH is set here).
Writes JSON and logs to $OUT, or benchmarks/results/<device>/ without it. Exits non-zero if anything is red.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """The environment in which the checkout is importable and its entry points are found."""
    sys.path[:0] = [str(ROOT), str(ROOT / "specs"), str(ROOT / "plugins")]
    paths = [str(ROOT), str(ROOT / "specs"), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip", action="append", default=[], choices=("kernels", "conformance", "bench"))
    parser.add_argument("--mixer", action="append", help="mixers to check; all registered ones by default")
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
    python = [sys.executable]
    steps = {
        "kernels": [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", "-n", "4"],
        "conformance": [*python, "-m", "zoo", "check", *(options.mixer or []), "--device", "cuda", "--dtype", "float32",
                        "--dtype", "bfloat16", "--json", str(out / "conformance.json")],
        "bench": [*python, "-m", "zoo", "bench", *(options.mixer or []), "--device", "cuda", "--length", "1024",
                  "--length", "4096", "--length", "16384", "--out", str(out / "bench"), "--no-check", "--no-train"],
    }  # fmt: skip
    outcome = {}
    for name, command in steps.items():
        if name in options.skip:
            continue
        start = time.time()
        with (out / f"{name}.log").open("w") as log:
            done = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
        text = (out / f"{name}.log").read_text()
        outcome[name] = {"exit": done.returncode, "seconds": round(time.time() - start, 1)}
        print(f"== {name}: exit {done.returncode} after {outcome[name]['seconds']} s\n{text[-3500:]}", flush=True)
    (out / "gpu_test.json").write_text(json.dumps({"device": device, "steps": outcome}, indent=1))
    return 0 if all(step["exit"] == 0 for step in outcome.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())

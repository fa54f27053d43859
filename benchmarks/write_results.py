"""Writes benchmarks/RESULTS.md from the JSON files under benchmarks/results/<device>/, and pictures beside them.

`python benchmarks/write_results.py`. Files: operators.json (benchmarks/operators.py), backends.json
(benchmarks/compare_backends.py), gpu_test.json (benchmarks/gpu_test.py); a device needs none of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT.parent), str(ROOT.parent / "specs")]

from benchmarks.pictures import draw, told_overtaking  # noqa: E402
from zoo.bench.timing import median  # noqa: E402

HEAD = """# Measured results

Written by `python benchmarks/write_results.py` from `benchmarks/results/`, which holds every sample. Medians of CUDA
events in milliseconds after warm-up, the L2 cache flushed before each sample. `f+b`: forward and backward to every
differentiable input. `graph`: the same calls inside a CUDA graph, without launches. `asked`: the targets of one H200;
`H200 peer`: the best peer's figures there. A copy on the H200 moves 4,268 GB/s, on an H100 about 2,900: rows that are
bound by memory take up to 1.5 times as long on an H100, rows bound by products 1.14 times (the peer of SSD: 1.138
against 1.296 ms). `floor`: least bytes over 4,268 GB/s.
"""


def main() -> None:
    parts = [HEAD]
    for folder in sorted((ROOT / "results").glob("*/")):
        parts += list(_device(folder))
    (ROOT / "RESULTS.md").write_text("\n".join(parts).rstrip() + "\n")


def _device(folder: Path) -> Iterator[str]:
    yield f"\n## {folder.name}\n"
    for name, told in (("gpu_test", _tests), ("operators", _operators), ("backends", _backends)):
        file = folder / f"{name}.json"
        if file.exists():
            yield from told(json.loads(file.read_text()), folder)


def _about(about: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in about.items() if not isinstance(value, dict | list))


def _tests(found: dict[str, Any], folder: Path) -> Iterator[str]:
    yield f"### Kernel tests and conformance\n\n{found['device']}\n"
    if "note" in found:
        yield f"{found['note']}\n"
    yield "| step | group | passed | skipped | failed |\n|---|---|---|---|---|"
    for step, outcome in found["steps"].items():
        for group, counts in outcome.get("counts", {}).items():
            passed, skipped, failed = (counts.get(kind, 0) for kind in ("passed", "skipped", "failed"))
            yield f"| {step} | {group} | {passed} | {skipped} | {failed} |"
    yield ""


def _operators(found: dict[str, Any], folder: Path) -> Iterator[str]:
    yield f"### Operators\n\n{_about(found['about'])}\n"
    yield (
        "| workload | implementation | fwd | f+b | graph fwd / f+b | asked fwd / f+b | H200 peer | floor | "
        "extra MiB f+b |\n|---|---|---|---|---|---|---|---|---|"
    )
    for row in found["rows"]:
        if "error" in row:
            yield f"| {row['row']} | {row['error']} | | | | | | | |"
        for entry in row["timings"]:
            if "error" in entry:
                yield f"| {row['row']} | {entry['who']} | {entry['error'][:80]} | | | | | | |"
                continue
            times = {kind: _time(entry, kind) for kind in ("fwd eager", "f+b eager", "fwd graph", "f+b graph")}
            memory = entry.get("f+b MiB", entry.get("fwd MiB", 0.0))
            same = all(entry.get(f"{kind} repeats", True) for kind in ("fwd", "f+b"))
            who = entry["who"] + ("" if same else " (not the same in every call)")
            yield (
                f"| {row['row']} | {who} | {times['fwd eager']} | {times['f+b eager']} | "
                f"{times['fwd graph']} / {times['f+b graph']} | {_pair(row['target'])} | {_pair(row['peer'])} | "
                f"{' / '.join(f'{floor:.2f}' for floor in row['floor_bytes_ms'])} | {memory:.0f} |"
            )
    yield ""
    for sentence in told_overtaking(found["rows"]):
        yield f"{sentence}\n"
    title = f"{found['about']['device']}, torch {found['about']['torch']}, triton {found['about']['triton']}"
    for picture in draw(found["rows"], title, folder):
        yield f"![{picture}](results/{folder.name}/{picture})\n"


def _backends(found: dict[str, Any], folder: Path) -> Iterator[str]:
    yield f"### Whole layers, every backend against the layer's own PyTorch path\n\n{_about(found['about'])}\n"
    yield "| mixer | backend | forward | against plain | train step | against plain | MiB of a train step | commit |"
    yield "|---|---|---|---|---|---|---|---|"
    plain: dict[str, dict[str, Any]] = {row["mixer"]: row for row in found["rows"] if row["plain"]}
    for row in found["rows"]:
        cells = []
        for kind in ("forward", "train step"):
            samples = row[kind].get("samples_ms")
            base = plain.get(row["mixer"], {}).get(kind, {}).get("samples_ms")
            cells.append(f"{median(samples):.3f}" if samples else row[kind].get("error", "")[:60])
            cells.append(f"x{median(base) / median(samples):.2f}" if samples and base and not row["plain"] else "")
        memory, commit = (row["train step"].get("peak_bytes") or 0) / 2**20, row.get("commit", "")
        yield f"| {row['mixer']} | {row['backend']} | {' | '.join(cells)} | {memory:.0f} | {commit} |"
    yield ""


def _time(entry: dict[str, Any], kind: str) -> str:
    return f"{median(entry[kind]):.3f}" if entry.get(kind) else "-"


def _pair(values: list[float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:g}" for value in values)


if __name__ == "__main__":
    main()

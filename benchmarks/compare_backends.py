"""Every backend of every registered mixer on one GPU: forward, forward and backward, memory, against its plain path.

`python benchmarks/compare_backends.py [NAMES] [--length 4096] [--tokens 32768] [--d-model 2048] [--out FILE.json]`
prints a table and writes JSON with device, versions, commit and every sample. A backend that is slower than the mixer's
own PyTorch path is marked. Rows are measured one after the other on an idle GPU; medians of CUDA events.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from zoo.bench.cases import Case, prepare
from zoo.bench.machine import describe_machine
from zoo.bench.memory import peak_bytes
from zoo.bench.timing import median, time_samples
from zoo.registry import registry

from sequence_mixer.conformance.probes import plain_backend, why_unusable

KINDS = ("forward", "train step")


def rows_of(name: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row per backend that runs here, except the definition itself."""
    able = registry.definition(name).capabilities
    plain = plain_backend(able)
    rows = []
    for spec in able.backends:
        if spec.name == "reference" or why_unusable(spec, device, dtype):
            continue
        row: dict[str, Any] = {"mixer": name, "backend": spec.name, "plain": spec.name == plain}
        for kind in KINDS:
            torch.cuda.empty_cache()
            try:
                batch = max(1, options.tokens // options.length)
                ready = prepare(Case(name, kind, options.length, batch), options.d_model, device, dtype)
                ready.mixer.backend = spec.name
                row[kind] = {
                    "peak_bytes": peak_bytes(ready.run, device),
                    "samples_ms": time_samples(ready.run, device, options.seconds),
                }
            except Exception as error:  # a backend that breaks is a row of its own, not the end of the table
                row[kind] = {"error": f"{type(error).__name__}: {error}"[:300]}
            ready = None
        rows.append(row)
    return rows


def told(row: dict[str, Any], plain: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [f"{row['mixer']:18} {row['backend']:10}"]
    for kind in KINDS:
        if "error" in row[kind]:
            cells.append(f"{kind}: {row[kind]['error']}")
            continue
        ms = median(row[kind]["samples_ms"])
        cells.append(f"{kind} {ms:9.3f} ms {row[kind]['peak_bytes'] / 2**20:8.0f} MiB")
        if not row["plain"] and "samples_ms" in plain.get(kind, {}):
            ratio = median(plain[kind]["samples_ms"]) / ms
            cells.append(f"x{ratio:.2f}{'  SLOWER THAN PLAIN' if ratio < 1 else ''}")
    return "  ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    about = describe_machine(device) | {
        "dtype": options.dtype, "d_model": options.d_model, "length": options.length, "tokens": options.tokens
    }  # fmt: skip
    print(json.dumps(about))
    stored = []
    for name in options.names or registry.names():
        rows = rows_of(name, options, device, dtype)
        plain = next((row for row in rows if row["plain"]), {})
        for row in rows:
            print(told(row, plain), flush=True)
        stored += rows
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"about": about, "rows": stored}, indent=1))


if __name__ == "__main__":
    main()

"""Every operator's workloads on one GPU, beside the peers that import: times, floors, memory, errors.

`python benchmarks/operators.py [--row TEXT ...] [--out DIR]` prints a table and writes `operators.json` (device,
versions, commit, every sample). Kernels are compiled first, in parallel processes; then one process measures on the
idle GPU, and is started again after the row that killed it. `eager`: CUDA events around a call, the L2 cache flushed
before. `graph`: the same inside a CUDA graph, without the launches. Ours are also called several times and compared
bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "specs"), str(ROOT / "plugins")]

import torch  # noqa: E402
from benchmarks import peers  # noqa: E402
from benchmarks.operator_rows import ROWS, Row, Work  # noqa: E402
from torch import Tensor  # noqa: E402

WARM_PROCESSES = 15
COPY_RATE = 4.268e12  # bytes per second of the H200, read and written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", action="append", help="rows whose name contains this; all by default")
    parser.add_argument("--seconds", type=float, default=0.15, help="measuring time of one number")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "benchmarks/results")))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--backend", action="append", help="backends of ours to time; all of a row by default")
    parser.add_argument("--warm-seconds", type=float, default=240, help="time for compiling in parallel")
    parser.add_argument("--child", choices=("warm", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options)
        return
    names = [name for name in ROWS if not options.row or any(part in name for part in options.row)]
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    _warm(names, options)
    print(f"compiled after {time.time() - start:.0f} s", flush=True)
    found: dict[str, Any] = {}
    while missing := [name for name in names if name not in found]:
        before = len(found)
        child = _spawn("measure", missing, options, stdout=subprocess.PIPE)
        assert child.stdout is not None
        for line in child.stdout:
            if not line.startswith('{"row"'):
                continue
            row = json.loads(line)
            found[row["row"]] = row
            for entry in row["timings"]:
                print(_told(row, entry), flush=True)
            _store(options.out / "operators.json", found)
        child.wait()
        if len(found) == before:
            found[missing[0]] = {"row": missing[0], "timings": [], "error": f"the process died ({child.returncode})"}
            print(f"{missing[0]:34} the process died", flush=True)
    _store(options.out / "operators.json", found)
    print(f"done after {time.time() - start:.0f} s")


def _store(file: Path, found: dict[str, Any]) -> None:
    from zoo.bench.machine import describe_machine

    about = describe_machine(torch.device("cuda"))
    file.write_text(json.dumps({"about": about, "rows": list(found.values())}, indent=1, default=str))


def _spawn(kind: str, names: list[str], options: argparse.Namespace, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", kind, "--only", json.dumps(names)]
    command += ["--seconds", str(options.seconds)] + (["--no-peers"] if options.no_peers else [])
    command += [part for backend in options.backend or [] for part in ("--backend", backend)]
    paths = [str(ROOT), str(ROOT / "specs"), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        command, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "2"}, **more
    )


def _warm(names: list[str], options: argparse.Namespace) -> None:
    """Compile what the rows need: every process runs its share of the rows once."""
    shares = [names[i::WARM_PROCESSES] for i in range(WARM_PROCESSES)]
    children = [_spawn("warm", share, options, stdout=subprocess.DEVNULL) for share in shares if share]
    until = time.time() + options.warm_seconds
    for child in children:
        try:
            child.wait(timeout=max(0.1, until - time.time()))
        except subprocess.TimeoutExpired:
            child.kill()


def _child(options: argparse.Namespace) -> None:
    for name in json.loads(options.only):
        if options.child == "warm":
            for _, call in _calls(ROWS[name], options):
                try:
                    work, run = call()
                    _once(run, work)
                except Exception as error:
                    print(f"{name}: {error}", file=sys.stderr)
                work = run = None  # type: ignore[assignment]
                torch.cuda.empty_cache()
        else:
            print(json.dumps(_measure(name, ROWS[name], options)), flush=True)


def _calls(row: Row, options: argparse.Namespace) -> list[tuple[str, Callable[[], tuple[Work, Callable[[], Any]]]]]:
    """(who, function that makes inputs and a call) of every implementation of a row."""

    def ours(backend: str) -> tuple[Work, Callable[[], Any]]:
        work = row.make("cuda")
        return work, lambda: work.call(backend)

    def theirs(peer: str) -> tuple[Work, Callable[[], Any]]:
        work = row.make("cuda")
        return work, getattr(peers, peer)(work.inputs)

    from functools import partial

    wanted = [backend for backend in row.backends if not options.backend or backend in options.backend]
    found = [(f"zoo {backend}", partial(ours, backend)) for backend in wanted]
    return found + [(peer, partial(theirs, peer)) for peer in row.peers if not options.no_peers]


def _output(run: Callable[[], Any]) -> Tensor:
    out = run()
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def _both(run: Callable[[], Any], work: Work) -> Callable[[], Any] | None:
    """Forward and backward to every differentiable input; None if there is none."""
    inputs = [tensor for tensor in work.inputs.values() if tensor.requires_grad]
    if not inputs:
        return None
    cotangent = torch.randn_like(_output(run))
    return lambda: torch.autograd.grad(_output(run), inputs, cotangent, allow_unused=True)


def _once(run: Callable[[], Any], work: Work) -> None:
    with torch.no_grad():
        run()
    both = _both(run, work)
    if both is not None:
        both()
    torch.cuda.synchronize()


def _measure(name: str, row: Row, options: argparse.Namespace) -> dict[str, Any]:
    from zoo.bench.memory import peak_bytes
    from zoo.bench.timing import time_samples

    device, timings = torch.device("cuda"), []
    moved: tuple[float, float] = (0.0, 0.0)
    for who, make in _calls(row, options):
        entry: dict[str, Any] = {"who": who}
        try:
            work, run = make()
            moved, entry["flops"] = work.moved, work.flops

            def forward(run: Callable[[], Any] = run) -> Any:
                with torch.no_grad():
                    return run()

            both = _both(run, work)
            for kind, call in (("fwd", forward), ("f+b", both)):
                if call is None:
                    continue
                if who.startswith("zoo") and both is not None:  # a step goes on from the state before
                    entry[f"{kind} repeats"] = _repeats(call)
                entry[f"{kind} eager"] = time_samples(call, device, options.seconds)
                entry[f"{kind} MiB"] = peak_bytes(call, device) / 2**20
                try:
                    entry[f"{kind} graph"] = time_samples(_captured(call), device, options.seconds)
                except Exception as error:
                    entry[f"{kind} graph error"] = str(error)[:200]
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"[:400]
        timings.append(entry)
        work = run = call = forward = both = None  # type: ignore[assignment]
        torch.cuda.empty_cache()
    floors = [part / COPY_RATE * 1e3 for part in moved]
    return {"row": name, "peer": row.peer, "target": row.target, "floor_bytes_ms": floors, "timings": timings}


def _repeats(call: Callable[[], Any], count: int = 4) -> bool:
    """Whether calls give the same bits, in memory that holds other numbers each time."""
    from torch.utils._pytree import tree_leaves

    def results() -> list[Tensor]:
        return [part.detach() for part in tree_leaves(call()) if isinstance(part, Tensor)]

    first = [part.clone() for part in results()]
    for _ in range(count):
        torch.randn(1 << 26, device="cuda")  # left behind in the allocator
        if not all(torch.equal(a, b) for a, b in zip(first, results(), strict=True)):
            return False
    return True


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    replay = graph.replay

    def run() -> Any:
        replay()
        return kept

    return run


def _told(row: dict[str, Any], entry: dict[str, Any]) -> str:
    from zoo.bench.timing import median

    if "error" in entry:
        return f"{row['row']:34} {entry['who']:14} {entry['error'][:140]}"
    cells = []
    for place, kind in enumerate(("fwd", "f+b")):
        if f"{kind} eager" not in entry:
            continue
        eager = median(entry[f"{kind} eager"])
        graph = median(entry[f"{kind} graph"]) if f"{kind} graph" in entry else float("nan")
        cells.append(
            f"{kind} {eager:8.3f} graph {graph:8.3f} (target {row['target'][place]}, peer {row['peer'][place]}, "
            f"bytes {row['floor_bytes_ms'][place]:.3f}) {entry[f'{kind} MiB']:6.0f} MiB"
        )
    if not all(entry.get(f"{kind} repeats", True) for kind in ("fwd", "f+b")):
        cells.append("NOT THE SAME IN EVERY CALL")
    return f"{row['row']:34} {entry['who']:14} " + "  ".join(cells)


if __name__ == "__main__":
    main()

"""Causal FAVOR+ in bfloat16: checks and times variants of the walks in one run; what is counted stands in performer.md.

    python benchmarks/notes/favor_engine.py     the whole run (GPU, 60 s); JSON lines to $OUT/favor_engine.json

Every variant is compiled and checked in a process of its own (compilations run side by side and a kernel that dies
takes nobody along), then the right ones are timed one after another, a line at once for each; the operator with the
best of each scheme comes last. Row: B8 T4096 H16 D128 m256, positive features.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Timer
from typing import Any

import torch

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path[:0] = [ROOT, os.path.join(ROOT, "specs")]

NAMES = ("y", "final", "dq", "dk", "dv")
ALLOWED = 8 * 2.0**-7  # relative RMS, the floor of the conformance budget in bfloat16
HEADS = 16  # a constant of the kernels: the same in checks and timings, so that what was compiled is found again
BUDGET, CHECKS, WORKERS = 58.0, 35.0, 5  # seconds of all, of the checks; processes


def variants() -> list[dict[str, Any]]:
    """Tables of the launcher, the default first; "walk": the walks that serve other widths."""
    names = ("CHUNK", "BLOCK_M", "SHARE", "RUN", "AHEAD", "num_warps", "num_stages")
    read = dict(zip(names, (128, 128, 1, 32, True, 8, 1)))
    gradient = dict(zip(names, (64, 64, 2, 32, False, 4, 1)))

    def lean(read: dict[str, Any], gradient: dict[str, Any]) -> dict[str, Any]:
        return {"scheme": "lean", "lean_read": read, "lean_gradient": gradient}

    return [
        lean(read, gradient),
        lean(read | {"AHEAD": False}, gradient | {"RUN": 64}),
        lean(read | {"RUN": 64}, gradient | {"SHARE": 1}),
        lean(read, gradient | {"CHUNK": 128, "SHARE": 1, "num_warps": 8}),
        {"scheme": "walk"},
    ]


def label(table: dict[str, Any]) -> str:
    """One variant in a few words."""
    parts = [" ".join(str(x) for x in table[k].values()) for k in ("lean_read", "lean_gradient") if k in table]
    return " | ".join([table["scheme"], *parts])


def draw(batch: int, tokens: int, heads: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Inputs of width 128 with 256 features; scale: of q and k."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=g)

    shape = (batch, tokens, heads, 128)
    sizes = {"q": scale, "k": scale, "v": 1.0, "dy": 1.0}
    made = {name: (size * normal(*shape)).bfloat16() for name, size in sizes.items()}
    return made | {"projection": normal(256, 128)}


def install(table: dict[str, Any]) -> None:
    """Let the operator use this variant."""
    from zoo.ops.favor_attention.kernels import launch, walk_launch, walk_lean_launch

    lean = table["scheme"] == "lean"
    launch.serves_lean = walk_lean_launch.serves_lean if lean else (lambda *sizes: False)
    walk_launch.TABLE.update({name: part for name, part in table.items() if name != "scheme"})


def outcome(given: dict[str, torch.Tensor], backend: str) -> dict[str, torch.Tensor]:
    """y, the final state's sums and the gradients of q, k, v."""
    from zoo.ops.favor_attention import favor_attention

    leaves = [given[name].detach().requires_grad_() for name in "qkv"]
    y, final = favor_attention(*leaves, given["projection"], backend=backend)
    grads = torch.autograd.grad((y * given["dy"]).sum(), leaves)
    mean = final[..., :-2] / final[..., -2:-1]  # does not depend on the maximum
    return dict(zip(NAMES, (y.detach(), mean.detach(), *grads)))


def relative(a: torch.Tensor, e: torch.Tensor) -> float:
    e = e.to(a.device)
    return float((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt())


def launches(table: dict[str, Any], given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Every launch of the installed variant with its sum over slices, by what it computes."""
    from zoo.ops.favor_attention.kernels import walk_launch

    q, k, v, dy, w = (given[name] for name in ("q", "k", "v", "dy", "projection"))
    starts = torch.arange(q.shape[0], device="cuda") * q.shape[1]
    spans = (starts, starts + q.shape[1]) * 2
    log_total, y = torch.zeros(*q.shape[:3], device="cuda"), torch.zeros_like(v)
    state = torch.zeros(q.shape[0], HEADS, 256, 130, device="cuda")
    delta, last = torch.zeros_like(log_total), state.clone()
    if table["scheme"] == "lean":
        return lean_launches(given, spans[0], spans[1], log_total, delta, state, last)
    walk = walk_launch.walk_of(k, w, *spans[:2], HEADS, 128, False, 0.0)
    read, gradient = walk_launch.read_walk, walk_launch.gradient_walk
    return {
        "y": lambda: read(walk, q, k, v, None, None, last, y, log_total),
        "dv": lambda: read(walk, k, q, dy, log_total, state, last, None, None),
        "dq": lambda: gradient(walk, q, k, dy, v, log_total, delta, None, last, reverse=False),
        "dk": lambda: gradient(walk, k, q, v, dy, log_total, delta, state, last, reverse=True),
    }


def lean_launches(
    given: dict[str, torch.Tensor], starts: torch.Tensor, ends: torch.Tensor, log_total: torch.Tensor,
    delta: torch.Tensor, state: torch.Tensor, last: torch.Tensor,
) -> dict[str, Any]:  # fmt: skip
    """Those of the lean walks; "around": what is formed before a forward and before a backward."""
    from zoo.ops.favor_attention.kernels import walk_lean_launch as lean

    q, k, v, dy, w = (given[name] for name in ("q", "k", "v", "dy", "projection"))
    walk = lean.lean_walk(k, w, starts, ends, HEADS)
    y, parts = torch.zeros_like(v), torch.empty((walk.parts("lean_read"), *dy.shape), dtype=dy.dtype, device=dy.device)
    beside = lean.beside_queries(dy, y, delta, log_total, delta)

    def around() -> None:
        lean.lean_walk(k, w, starts, ends, HEADS)
        lean.beside_queries(dy, y, delta, log_total, torch.empty_like(delta))

    def dv() -> torch.Tensor:
        lean.read(walk, k, q, dy, walk.beside, beside, state, last, parts, None)
        return lean.gathered(parts, None, k)

    return {
        "y": lambda: lean.lean_forward(walk, q, k, v, None, last, y, log_total),
        "dv": dv,
        "dq": lambda: lean.gradient(walk, q, k, dy, v, beside, walk.beside, delta, None, last, reverse=False),
        "dk": lambda: lean.gradient(walk, k, q, v, dy, walk.beside, beside, None, state, last, reverse=True),
        "around": around,
        "gathered": lambda: lean.gathered(parts, None, k),
    }


def compile_all(table: dict[str, Any]) -> None:
    """The kernels of the installed variant, compiled side by side."""
    calls = launches(table, draw(1, 256, HEADS))
    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(call) for call in calls.values()]:
            job.exception()  # the check meets it again


def check_child(index: int, folder: str) -> None:
    table = variants()[index]
    install(table)
    compile_all(table)
    errors = {}
    for name, (given, exact) in torch.load(f"{folder}/exact.pt").items():
        found = outcome(given, "triton")
        errors[name] = {part: relative(found[part], exact[part]) for part in NAMES}
        again = outcome(given, "triton")
        errors[name]["again"] = float(not all(torch.equal(again[part], found[part]) for part in NAMES))
        if name == "small":
            errors[name]["leak"] = max(leak(given, found["y"], scale) for scale in (1.0, 10.0, 100.0))
    torch.cuda.synchronize()
    print(json.dumps({"index": index, "errors": errors}), flush=True)


def leak(given: dict[str, torch.Tensor], y: torch.Tensor, scale: float) -> float:
    """1 if other tokens from the 100th on, `scale` times as large, change a bit of those before; else 0."""
    changed = {name: x.clone() for name, x in given.items()}
    for name in "qkv":
        changed[name][:, 100:] = scale * changed[name][:, 100:].flip(1)
    changed["k"][:, 107] = 0.0
    return float(not torch.equal(outcome(changed, "triton")["y"][:, :100], y[:, :100]))


def median(run: Any, repetitions: int = 5) -> float:
    """Milliseconds of one call."""
    run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return round(sorted(begin.elapsed_time(end) for begin, end in events)[repetitions // 2], 4)


def time_child(indices: list[int], until: float) -> None:
    """Milliseconds of each launch with its sum over slices, then of the operator, forward and forward + backward."""
    given = draw(8, 4096, HEADS)
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for index in indices:
        if time.time() > until:
            break
        table = variants()[index]
        install(table)
        ms = {name: median(run) for name, run in launches(table, given).items()}
        key = table["scheme"]
        if key not in best or sum(ms.values()) < best[key][0]:
            best[key] = (sum(ms.values()), table)
        print(json.dumps({"index": index, "ms": ms, "what": label(table)}), flush=True)
    for _, table in sorted(best.values(), key=lambda entry: entry[0]):
        if time.time() < until + 4:
            install(table)
            print(json.dumps({"whole": label(table), **whole(given)}), flush=True)


def whole(given: dict[str, torch.Tensor]) -> dict[str, float]:
    """The operator, as a layer calls it."""
    from zoo.ops.favor_attention import favor_attention

    leaves = [given[name].detach().requires_grad_() for name in "qkv"]

    def forward() -> torch.Tensor:
        return favor_attention(*leaves, given["projection"], backend="triton")[0]

    with torch.no_grad():
        ms = {"forward": median(forward)}
    return ms | {"both": median(lambda: torch.autograd.grad(forward(), leaves, given["dy"]))}


def lines_of(arguments: list[str], seconds: float, *, show: bool = False) -> tuple[list[dict[str, Any]], str]:
    """What a child printed (at once too, if show), and the last line of its errors."""
    command = [sys.executable, os.path.abspath(__file__), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    timer = Timer(max(seconds, 1.0), process.kill)
    timer.start()
    with ThreadPoolExecutor(1) as pool:
        errors = pool.submit(process.stderr.read)
        found = []
        for line in process.stdout:
            if line.startswith("{"):
                found.append(json.loads(line))
                if show:
                    print(line.strip(), flush=True)
        process.wait()
        timer.cancel()
        said = (errors.result().strip().splitlines() or ["ended early"])[-1][:200]
        return found, said if process.returncode else ""


def main() -> None:
    begin = time.time()
    folder = tempfile.mkdtemp()
    data = {}
    sizes = {"small": (1, 600, HEADS, 1.0), "large": (1, 300, HEADS, 3.0)}  # the large ones cut runs short
    for name, size in sizes.items():
        given = draw(*size)
        data[name] = (given, outcome({n: x.double() for n, x in given.items()}, "chunked"))
    torch.save(data, f"{folder}/exact.pt")
    del data, given
    torch.cuda.empty_cache()
    cases = variants()
    results: list[dict[str, Any]] = [{"table": table} for table in cases]

    def check(index: int) -> None:
        found, err = lines_of(["--check", str(index), folder], CHECKS - (time.time() - begin))
        results[index] |= found[-1] if found else {"failed": err}
        errors = {n: {k: f"{e:.1e}" for k, e in each.items()} for n, each in results[index].get("errors", {}).items()}
        print(f"{time.time() - begin:.0f} s", label(cases[index]), errors, results[index].get("failed", ""), flush=True)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(check, range(len(cases))))
    right = [
        i for i, result in enumerate(results)
        if all(e < ALLOWED for each in result.get("errors", {"none": {"": 1.0}}).values() for e in each.values())
    ]  # fmt: skip
    print("right:", right, flush=True)
    todo, wholes, err = right, [], ""
    while todo and not wholes and time.time() - begin < BUDGET - 8:
        arguments = ["--time", json.dumps(todo), str(begin + BUDGET - 8)]
        found, err = lines_of(arguments, BUDGET - (time.time() - begin), show=True)
        for line in found:
            if "index" in line:
                results[line["index"]] |= line
        wholes += [line for line in found if "whole" in line]
        done = [line["index"] for line in found if "index" in line]
        todo = [i for i in todo if i not in done][1:]  # the first of them ended the child
    if err:
        print("last error:", err)
    with open(os.path.join(os.environ.get("OUT", folder), "favor_engine.json"), "w") as file:
        json.dump({"variants": results, "wholes": wholes, "device": torch.cuda.get_device_name()}, file)
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        check_child(int(sys.argv[2]), sys.argv[3])
    elif sys.argv[1:2] == ["--time"]:
        time_child(json.loads(sys.argv[2]), float(sys.argv[3]))
    else:
        main()

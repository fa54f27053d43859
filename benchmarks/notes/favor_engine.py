"""Causal FAVOR+ in bfloat16: checks and times variants of the walks in one run; what is counted stands in performer.md.

    python benchmarks/notes/favor_engine.py     the whole run (GPU); JSON lines to $OUT/favor_engine.json

Every variant is compiled and checked in a process of its own (compilations run side by side and a kernel that dies
takes nobody along), then the right ones are timed one after another. Row: B8 T4096 H16 D128 m256, positive features.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path[:0] = [ROOT, os.path.join(ROOT, "specs")]

NAMES = ("y", "final", "dq", "dk", "dv")
ALLOWED = 8 * 2.0**-7  # relative RMS, the floor of the conformance budget in bfloat16; the kernels before have up to 2.8e-2
HEADS = 16  # a constant of the kernels: the same in checks and timings, so that what was compiled is found again
BUDGET, WORKERS = 48.0, 14


def variants() -> list[dict[str, Any]]:
    """Tables of the launcher; None of a kernel: the kernels before the walks."""
    found: list[dict[str, Any]] = [{"old": True}]
    for weights, read, gradient in (
        ("single", (64, 128, 4, 1), (64, 64, 4, 1)), ("single", (64, 64, 4, 1), (64, 128, 4, 1)),
        ("single", (64, 64, 4, 2), (64, 64, 4, 2)), ("single", (64, 128, 8, 1), (64, 64, 8, 1)),
        ("single", (64, 128, 8, 2), (128, 64, 8, 1)),
        ("split", (64, 128, 4, 1), (64, 64, 4, 1)), ("split", (64, 64, 4, 1), (64, 128, 4, 1)),
        ("half", (64, 128, 4, 1), (64, 64, 4, 1)),
    ):  # fmt: skip
        names = ("CHUNK", "BLOCK_M", "num_warps", "num_stages")
        table = {"read": dict(zip(names, read)) | {"RUN": 32}, "gradient": dict(zip(names, gradient)) | {"RUN": 32}}
        found.append(table | {"weights": weights})
    return found


def draw(batch: int, tokens: int, heads: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Inputs of width 128 with 256 features; scale: of q and k."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=g)

    shape = (batch, tokens, heads, 128)
    made = {name: (size * normal(*shape)).bfloat16() for name, size in (("q", scale), ("k", scale), ("v", 1.0), ("dy", 1.0))}
    return made | {"projection": normal(256, 128)}


def install(table: dict[str, Any]) -> None:
    """Let the operator use this variant."""
    from zoo.ops.favor_attention.kernels import launch, walk_launch

    walk_launch.WIDEST = 128
    if "old" in table:
        launch.serves = lambda *sizes: False
    else:
        walk_launch.TABLE.clear()
        walk_launch.TABLE.update(table)


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


def compile_walks() -> None:
    """The four kernels of the installed variant, compiled side by side."""
    from zoo.ops.favor_attention.kernels import walk_launch

    given = draw(1, 64, HEADS)
    q, k, v, dy, w = (given[name] for name in ("q", "k", "v", "dy", "projection"))
    starts = torch.zeros(1, dtype=torch.int64, device="cuda")
    walk = walk_launch.walk_of(k, w, starts, starts, HEADS, 128, False, 0.0)  # no tokens: nothing is computed
    row, state = torch.zeros(1, 64, HEADS, device="cuda"), torch.zeros(1, HEADS, 256, 130, device="cuda")
    read, gradient = walk_launch.read_walk, walk_launch.gradient_walk
    calls = (
        lambda: read(walk, q, k, v, None, None, state, torch.empty_like(v), row),
        lambda: read(walk, k, q, dy, row, state, state.clone(), None, None),
        lambda: gradient(walk, q, k, dy, v, row, row, None, state, reverse=False),
        lambda: gradient(walk, k, q, v, dy, row, row, state, state.clone(), reverse=True),
    )
    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(call) for call in calls]:
            job.exception()  # the check meets it again


def check_child(index: int, folder: str) -> None:
    install(variants()[index])
    if index:
        compile_walks()
    errors = {}
    for name, (given, exact) in torch.load(f"{folder}/exact.pt").items():
        found = outcome(given, "triton")
        errors[name] = {part: relative(found[part], exact[part]) for part in NAMES}
        if index and name == "small":
            given["k"][:, 100:] *= 30.0
            given["k"][:, 107] = 0.0
            given["v"][:, 100:] += 1.0
            same = torch.equal(outcome(given, "triton")["y"][:, :100], found["y"][:, :100])
            errors[name]["leak"] = 0.0 if same else 1.0
    torch.cuda.synchronize()
    print(json.dumps({"index": index, "errors": errors}), flush=True)


def median(run: Any) -> float:
    import triton

    return round(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"), 4)


def time_child(indices: list[int], until: float) -> None:
    """Milliseconds of each launch with its sum over slices, then of the operator, forward and forward + backward."""
    from zoo.ops.favor_attention.kernels import launch, walk_launch

    given = draw(8, 4096, HEADS)
    q, k, v, dy, w = (given[name] for name in ("q", "k", "v", "dy", "projection"))
    starts = torch.arange(8, device="cuda") * 4096
    spans = (starts, starts + 4096) * 2
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for index in indices:
        if time.time() > until:
            break
        table = variants()[index]
        install(table)
        y, log_total, state = launch.forward(q, k, v, w, None, spans, False, False, True, 0.0)
        delta, first, last = torch.zeros_like(log_total), torch.cat([state[..., :-1] * 0, -state[..., -1:]], -1), state.clone()
        if "old" in table:
            ms = {"forward": median(lambda: launch.forward(q, k, v, w, None, spans, False, False, True, 0.0))}
            ms["backward"] = median(lambda: launch.backward(
                dy, delta, state * 0, q, k, v, w, None, y, log_total, state, spans, False, False, True, 0.0))  # fmt: skip
            launch.serves = walk_launch.serves
        else:
            walk = walk_launch.walk_of(k, w, *spans[:2], HEADS, 128, False, 0.0)
            read, gradient = walk_launch.read_walk, walk_launch.gradient_walk
            ms = {
                "y": median(lambda: read(walk, q, k, v, None, None, state, y, log_total)),
                "dv": median(lambda: read(walk, k, q, dy, log_total, first, last, None, None)),
                "dq": median(lambda: gradient(walk, q, k, dy, v, log_total, delta, None, last, reverse=False)),
                "dk": median(lambda: gradient(walk, k, q, v, dy, log_total, delta, first, last, reverse=True)),
            }
            for weights in (table["weights"], "any"):
                for kernel, parts in (("read", ("y", "dv")), ("gradient", ("dq", "dk"))):
                    total = sum(ms[part] for part in parts)
                    key = f"{weights} {kernel}"
                    if key not in best or total < best[key][0]:
                        best[key] = (total, table)
        print(json.dumps({"index": index, "ms": ms}), flush=True)
    for weights in ("single", "half", "split"):
        if f"{weights} read" not in best or time.time() > until + 4:
            continue
        table = {kernel: best[f"{weights} {kernel}"][1][kernel] for kernel in ("read", "gradient")} | {"weights": weights}
        install(table)
        print(json.dumps({"whole": weights, "table": table, **whole(given)}), flush=True)


def whole(given: dict[str, torch.Tensor]) -> dict[str, float]:
    """The operator, as a layer calls it."""
    from zoo.ops.favor_attention import favor_attention

    leaves = [given[name].detach().requires_grad_() for name in "qkv"]

    def forward() -> torch.Tensor:
        return favor_attention(*leaves, given["projection"], backend="triton")[0]

    with torch.no_grad():
        ms = {"forward": median(forward)}
    return ms | {"both": median(lambda: torch.autograd.grad(forward(), leaves, given["dy"]))}


def lines_of(arguments: list[str], seconds: float) -> tuple[list[dict[str, Any]], str]:
    """What a child printed, and the last line of its errors."""
    process = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += "\ntimed out"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], (err.strip().splitlines() or [""])[-1][:200]


def main() -> None:
    begin = time.time()
    folder = tempfile.mkdtemp()
    data = {}
    for name, size in (("small", (1, 600, HEADS, 1.0)), ("large", (1, 300, HEADS, 3.0))):  # the large ones cut runs short
        given = draw(*size)
        data[name] = (given, outcome({n: x.double() for n, x in given.items()}, "chunked"))
    torch.save(data, f"{folder}/exact.pt")
    del data, given
    torch.cuda.empty_cache()
    cases = variants()
    results: list[dict[str, Any]] = [{"table": table} for table in cases]

    def check(index: int) -> None:
        found, err = lines_of(["--check", str(index), folder], BUDGET - 14 - (time.time() - begin))
        results[index] |= found[-1] if found else {"failed": err}

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(check, range(len(cases))))
    print(f"checked after {time.time() - begin:.0f} s", flush=True)
    right = [
        i for i, result in enumerate(results)
        if i == 0 or all(e < ALLOWED for each in result.get("errors", {"none": {"": 1.0}}).values() for e in each.values())
    ]  # fmt: skip
    todo, wholes, err = right, [], ""
    while todo and time.time() - begin < BUDGET - 8:
        found, err = lines_of(["--time", json.dumps(todo), str(begin + BUDGET - 7)], BUDGET - (time.time() - begin))
        for line in found:
            if "index" in line:
                results[line["index"]] |= line
        wholes += [line for line in found if "whole" in line]
        done = [line["index"] for line in found if "index" in line]
        if not done or wholes:
            break
        todo = [i for i in todo if i not in done][1:]  # the first of them ended the child
    for index, result in enumerate(results):
        table = result["table"]
        short = " | ".join(" ".join(str(x) for x in table[kernel].values()) for kernel in ("read", "gradient") if kernel in table)
        errors = {n: {k: f"{e:.1e}" for k, e in each.items()} for n, each in result.get("errors", {}).items()}
        verdict = "ok" if index in right else "WRONG"
        print(result["table"].get("weights", ""), short, verdict, result.get("ms", "-"), errors, result.get("failed", ""))
    for line in wholes:
        print(json.dumps(line))
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

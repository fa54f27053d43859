"""The long convolution by Toeplitz tiles: checks and times block sizes, and the public operator, in one run.

    python benchmarks/notes/long_engine.py            the whole run (GPU, about 30 s); JSON to $OUT/long_engine.json

bf16 in and out, kernels float32 [D,T], D 2048. Counts and predictions: long_convolution.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path[:0] = [ROOT, os.path.join(ROOT, "specs")]

CALLS = [(8, 1024), (8, 2048), (8, 4096), (2, 16384)]  # B, T
PRODUCTS = [
    (64, 64, 128, 8, 4, 3), (64, 64, 128, 8, 4, 1), (128, 64, 128, 8, 8, 3), (128, 64, 128, 8, 8, 4),
    (64, 64, 128, 8, 4, 2), (64, 64, 128, 8, 8, 1), (64, 64, 128, 8, 8, 3), (64, 64, 64, 8, 4, 3),
    (128, 64, 128, 8, 8, 2), (128, 64, 128, 8, 8, 1), (128, 64, 128, 4, 8, 3), (128, 64, 64, 8, 4, 3),
    (128, 64, 64, 8, 4, 1), (128, 128, 128, 8, 8, 2), (128, 128, 64, 8, 4, 2), (64, 64, 256, 8, 8, 3),
    (256, 64, 128, 8, 8, 3), (128, 64, 256, 8, 8, 3), (256, 64, 64, 8, 8, 3), (64, 64, 128, 4, 4, 3),
]  # fmt: skip  # chunk, step, rows, copies, warps, stages
PAIRS = [
    (64, 64, 4, 3), (64, 64, 4, 1), (64, 64, 4, 2), (64, 128, 4, 1), (64, 128, 4, 2), (64, 32, 4, 4), (64, 64, 4, 4),
    (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 1), (128, 128, 8, 1), (128, 32, 8, 4),
]  # fmt: skip  # chunk, rows, warps, stages
CASES = [(kind, i) for i in range(20) for kind, rows in (("product", PRODUCTS), ("pairs", PAIRS)) if i < len(rows)]


def draw(D, B, T, W):
    g = torch.Generator("cuda").manual_seed(T)
    u, dy = (torch.randn(D, B, T, device="cuda", generator=g).bfloat16() for _ in range(2))
    return u, dy, torch.randn(D, W, device="cuda", generator=g) * W**-0.5


def run(kind, i, u, dy, taps, ahead, mirror=False):
    from zoo.ops.long_convolution.kernels import dense_launch

    if kind == "product":
        return dense_launch.toeplitz(u, taps, ahead, mirror=mirror, blocks=dense_launch.Blocks(*PRODUCTS[i]))
    return dense_launch.tap_gradient(u, dy, taps.shape[1], ahead, dense_launch.PairBlocks(*PAIRS[i]))


def exact(u, dy, taps, ahead):
    """y, the mirrored product and the gradient of the taps in float64, as one Toeplitz matrix a channel."""
    u, dy, taps = u.double(), dy.double(), taps.double().requires_grad_()
    T, W = u.shape[2], taps.shape[1]
    step = torch.arange(T, device=u.device)
    lag = step[:, None] - step + ahead
    matrix = torch.where((lag >= 0) & (lag < W), taps[:, lag.clamp(0, W - 1)], 0.0)
    (gradient,) = torch.autograd.grad(torch.einsum("dij,dbj->dbi", matrix, u), taps, dy)
    matrix = matrix.detach()
    return torch.einsum("dij,dbj->dbi", matrix, u), torch.einsum("dij,dbi->dbj", matrix, u), gradient


def relative(a, e):
    return float((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt())


def check_child(cases):
    """Compiles and checks variants; prints a line before and after each, since a wrong kernel may end the process."""
    problems = []
    for B, T, W, ahead in ((3, 608, 608, 0), (2, 592, 1100, 500)):
        given = draw(4, B, T, W)
        problems.append((given, ahead, exact(*given, ahead)))
    for kind, i in cases:
        print(json.dumps({"begun": [kind, i]}), flush=True)
        try:
            error = 0.0
            for given, ahead, (y, mirrored, gradient) in problems:
                if kind == "product":
                    error = max(error, relative(run(kind, i, *given, ahead), y))
                    error = max(error, relative(run(kind, i, *given, ahead, mirror=True), mirrored))
                else:
                    error = max(error, relative(run(kind, i, *given, ahead), gradient))
            torch.cuda.synchronize()
            found = {"error": error}
        except Exception as failure:
            found = {"failed": f"{type(failure).__name__} {failure}"[-120:]}
            if "CUDA error" in str(failure) or "illegal" in str(failure):
                raise
        print(json.dumps({"case": [kind, i]} | found), flush=True)


def graph_ms(fn, repeats=10):
    """Median time of `fn` in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fn()
        fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for k in range(repeats):
        marks[2 * k].record()
        graph.replay()
        marks[2 * k + 1].record()
    torch.cuda.synchronize()
    return round(sorted(marks[2 * k].elapsed_time(marks[2 * k + 1]) for k in range(repeats))[repeats // 2], 4)


def time_child(cases, deadline):
    for call, (B, T) in enumerate(CALLS):
        given = draw(2048, B, T, T)
        for kind, i in cases:
            if time.time() > deadline:
                return
            try:
                ms = graph_ms(lambda: run(kind, i, *given, 0))  # noqa: B023
                print(json.dumps({"case": [kind, i], "call": call, "ms": ms}), flush=True)
            except Exception as failure:
                print(json.dumps({"case": [kind, i], "call": call, "failed": str(failure)[-120:]}), flush=True)
        del given
        torch.cuda.empty_cache()


def whole_child():
    """The public operator: y and gradients beside float64 at T 1024, then times beside fft and transforms."""
    from zoo.ops import long_convolution
    from zoo.ops.long_convolution import triton_path
    from zoo.ops.long_convolution.kernels.gates import time_first, time_last

    def leaves(B, T, D, dtype=torch.bfloat16, gates=False):
        g = torch.Generator("cuda").manual_seed(T)
        made = {"x": torch.randn(B, T, D, device="cuda", generator=g).bfloat16(), "kernel": torch.randn(D, T, device="cuda", generator=g) * T**-0.5}
        if gates:
            made |= {n: torch.randn(B, T, D, device="cuda", generator=g).bfloat16() for n in ("pre_gate", "post_gate")}
            made["D"] = torch.randn(D, device="cuda", generator=g)
            made["reverse_kernel"] = torch.randn(D, T // 2, device="cuda", generator=g) * T**-0.5
        dy = torch.randn(B, T, D, device="cuda", generator=g).bfloat16().to(dtype)
        return {n: (t if dtype == torch.bfloat16 else t.to(dtype)).requires_grad_() for n, t in made.items()}, dy

    def both(given, dy, backend):
        y = long_convolution(**given, backend=backend)
        return [y, *torch.autograd.grad(y, list(given.values()), dy)]

    for gates in (False, True):
        sizes = (3, 1024, 24)
        wanted = both(*leaves(*sizes, dtype=torch.float64, gates=gates), "fft")
        errors = {name: {n: relative(a.detach(), e.detach()) for n, a, e in zip(["y", *leaves(*sizes, gates=gates)[0]], both(*leaves(*sizes, gates=gates), name), wanted, strict=True)}
                  for name in ("triton", "fft")}  # fmt: skip
        print(json.dumps({"gates": gates, "errors": errors}), flush=True)
    for B, T in CALLS:
        given, dy = leaves(B, T, 2048)
        x = given["x"].detach()
        x_t = time_last(x, None, torch.bfloat16)
        found = {"B": B, "T": T, "time_last": graph_ms(lambda: time_last(x, None, torch.bfloat16)), "time_first": graph_ms(lambda: time_first(x_t, None, torch.bfloat16))}  # noqa: B023
        longest = triton_path.LONGEST[torch.bfloat16]
        for name, backend, most in (("tiles", "triton", 1 << 30), ("transforms", "triton", 16), ("fft", "fft", longest)):
            triton_path.LONGEST[torch.bfloat16] = most

            def ahead():
                with torch.no_grad():
                    return long_convolution(**given, backend=backend)  # noqa: B023

            try:
                found[name] = [graph_ms(ahead, 5), graph_ms(lambda: both(given, dy, backend), 5)]  # noqa: B023
            except Exception as failure:
                found[name] = str(failure)[-150:]
        triton_path.LONGEST[torch.bfloat16] = longest
        print(json.dumps(found), flush=True)
        del given, dy, x, x_t
        torch.cuda.empty_cache()


def lines_of(arguments, seconds):
    process = subprocess.Popen([sys.executable, os.path.abspath(__file__), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return found, (err.strip().splitlines() or [""])[-1][:200]


def main(budget=40.0, workers=12):
    begin = time.time()
    left = lambda: budget - (time.time() - begin)
    results = {case: {} for case in CASES}

    def check(todo):
        while todo and left() > 22:
            found, err = lines_of(["--check", json.dumps(todo)], left() - 20)
            for line in found:
                if "case" in line:
                    results[tuple(line["case"])].update({k: v for k, v in line.items() if k != "case"})
            begun = [tuple(line["begun"]) for line in found if "begun" in line]
            if begun and not results[begun[-1]]:
                results[begun[-1]]["failed"] = "died: " + err
            rest = [case for case in todo if case not in begun]
            if len(rest) == len(todo):
                results[todo[0]]["failed"] = "not begun: " + err
                return
            todo = rest

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(check, [CASES[w::workers] for w in range(workers)]))
    print(f"checked after {time.time() - begin:.0f} s", flush=True)
    wholes, err = lines_of(["--whole"], 18)
    for line in wholes:
        print(json.dumps(line), flush=True)
    if len(wholes) < 2 + len(CALLS):
        print("wholes stopped:", err)
    todo = [case for case, found in results.items() if found.get("error", 1.0) < 1e-2]
    found, err = lines_of(["--time", json.dumps(todo), str(time.time() + 14)], 16)
    for line in found:
        results[tuple(line["case"])][f"ms{line['call']}"] = line.get("ms", line.get("failed"))
    if len(found) < len(todo) * len(CALLS):
        print("timing stopped:", err)
    for kind, rows in (("product", PRODUCTS), ("pairs", PAIRS)):
        print(kind, "| ms at B, T", CALLS, "| error")
        for i, blocks in enumerate(rows):
            r = results[kind, i]
            print(*blocks, "|", *(r.get(f"ms{c}", "-") for c in range(len(CALLS))), "|", r.get("error", "-"), r.get("failed", ""))
    with open(f"{os.environ.get('OUT', tempfile.mkdtemp())}/long_engine.json", "w") as file:
        blocks = {"product": PRODUCTS, "pairs": PAIRS}
        listed = [{"kind": k, "blocks": blocks[k][i]} | r for (k, i), r in results.items()]
        json.dump({"calls": CALLS, "variants": listed, "wholes": wholes, "device": torch.cuda.get_device_name()}, file)
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    mode = sys.argv[1] if len(sys.argv) > 1 else ""
    if mode == "--check":
        check_child([tuple(case) for case in json.loads(sys.argv[2])])
    elif mode == "--time":
        time_child([tuple(case) for case in json.loads(sys.argv[2])], float(sys.argv[3]))
    elif mode == "--whole":
        whole_child()
    else:
        main()

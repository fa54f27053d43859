"""The long convolution by Toeplitz tiles: checks and times block sizes, and the public operator, in one run.

    python benchmarks/notes/long_engine.py            the whole run (GPU, under 60 s); JSON to $OUT/long_engine.json

bf16 in and out, kernels float32 [D,T], D 2048. Counts and predictions: long_convolution.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path[:0] = [ROOT, os.path.join(ROOT, "specs")]

CALLS = [(8, 1024), (8, 2048), (8, 4096), (2, 16384)]  # B, T
ORDER = [("kernel_times", 0), ("kernel_times", 2), ("whole_times", 0), ("whole_times", 2), ("whole_times", 3),
         ("kernel_times", 3), ("whole_times", 1), ("kernel_times", 1)]  # fmt: skip
PRODUCTS = [
    (64, 64, 128, 8, 8, 8, 3), (128, 64, 128, 4, 8, 8, 3), (64, 64, 128, 4, 8, 8, 3), (64, 64, 128, 4, 4, 8, 3),
    (128, 64, 128, 4, 4, 8, 2), (128, 64, 128, 8, 8, 8, 3),
]  # fmt: skip  # chunk, step, rows, copies, vector, warps, stages
PAIRS = [
    (64, 256, 8, 64, 8, 2, 128), (64, 256, 4, 64, 8, 2, 128), (64, 256, 8, 64, 8, 1, 128), (64, 64, 8, 64, 4, 2, None),
    (128, 256, 4, 64, 8, 2, None),
]  # fmt: skip  # chunk, width, vector, rows, warps, stages, most registers
CASES = [(kind, i) for i in range(6) for kind, rows in (("product", PRODUCTS), ("pairs", PAIRS)) if i < len(rows)]


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
    for B, T, W, ahead in ((8, 608, 608, 0), (2, 592, 1100, 500)):  # batches of CALLS, for which kernels are made
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


def kernel_times(call):
    """The variants of the tiles at one size, and the parts of the transforms."""
    from zoo.ops.long_convolution.fft import fft_length
    from zoo.ops.long_convolution.kernels import spectra

    B, T = CALLS[call]
    u, dy, taps = draw(2048, B, T, T)
    timed = {}
    for kind, rows in (("product", PRODUCTS), ("pairs", PAIRS)):
        for i, blocks in enumerate(rows):
            timed[f"{kind} " + " ".join(map(str, blocks))] = lambda kind=kind, i=i: run(kind, i, u, dy, taps, 0)
    n = fft_length(2 * T - 1)
    rows_n = torch.zeros(2048, B, n, device="cuda")
    rows_n[..., :T] = u
    taps_n = torch.nn.functional.pad(taps, (0, n - T))
    u_f, taps_f = spectra.transform(rows_n), spectra.transform(taps_n)
    timed |= {
        "transform of rows": lambda: spectra.transform(rows_n),
        "transform of taps": lambda: spectra.transform(taps_n),
        "way back": lambda: spectra.back(u_f),
        "product of spectra": lambda: spectra.product(u_f, taps_f, conjugate=False),
        "summed product": lambda: spectra.product(u_f, u_f, conjugate=True, summed=True),
        **{f"convolutions by {c} channels": lambda c=c: in_parts(rows_n, taps_n, c) for c in (2048, 256, 64)},
        "pairs by transforms": lambda: spectra.tap_gradient(u, dy, T, 0),
    }
    return timed


def in_parts(rows_n, taps_n, channels):
    """Whether transforms of few channels at a time, which stay in L2, are worth their launches."""
    from zoo.ops.long_convolution.kernels import spectra

    for part in range(0, rows_n.shape[0], channels):
        spectra.convolve(rows_n[part : part + channels], taps_n[part : part + channels])


def whole_times(call):
    """The public operator, y alone and with gradients, by tiles, by both, by transforms and by torch.fft."""
    from zoo.ops import long_convolution
    from zoo.ops.long_convolution import crossover

    B, T = CALLS[call]
    given, dy = leaves(B, T, 2048)

    def timed(backend, most, gradient_most, gradients):
        kept = crossover.LONGEST[torch.bfloat16], crossover.GRADIENT_LONGEST[torch.bfloat16]
        crossover.LONGEST[torch.bfloat16], crossover.GRADIENT_LONGEST[torch.bfloat16] = most, gradient_most

        def ahead():
            with torch.no_grad():
                return long_convolution(**given, backend=backend)

        ms = graph_ms((lambda: both(given, dy, backend)) if gradients else ahead, 3)
        crossover.LONGEST[torch.bfloat16], crossover.GRADIENT_LONGEST[torch.bfloat16] = kept
        return ms

    ways = {"tiles": ("triton", 1 << 30, 1 << 30), "tiles, taps by transforms": ("triton", 1 << 30, 16),
            "transforms": ("triton", 16, 16), "torch.fft": ("fft", 16, 16)}  # fmt: skip
    return {f"{name}: {what}": lambda way=way, g=g: timed(*way, g) for name, way in ways.items()
            for what, g in (("y", False), ("y and gradients", True)) if g or "taps by" not in name}  # fmt: skip


def leaves(B, T, D, dtype=torch.bfloat16, gates=False):
    g = torch.Generator("cuda").manual_seed(T)
    made = {
        "x": torch.randn(B, T, D, device="cuda", generator=g).bfloat16(),
        "kernel": torch.randn(D, T, device="cuda", generator=g) * T**-0.5,
    }
    if gates:
        made |= {n: torch.randn(B, T, D, device="cuda", generator=g).bfloat16() for n in ("pre_gate", "post_gate")}
        made["D"] = torch.randn(D, device="cuda", generator=g)
        made["reverse_kernel"] = torch.randn(D, T // 2, device="cuda", generator=g) * T**-0.5
    dy = torch.randn(B, T, D, device="cuda", generator=g).bfloat16().to(dtype)
    return {n: (t if dtype == torch.bfloat16 else t.to(dtype)).requires_grad_() for n, t in made.items()}, dy


def both(given, dy, backend):
    from zoo.ops import long_convolution

    y = long_convolution(**given, backend=backend)
    return [y, *torch.autograd.grad(y, list(given.values()), dy)]


def errors_of_operator():
    """y and gradients beside float64 at T 1024, by tiles and by transforms."""
    from zoo.ops.long_convolution import crossover

    longest = crossover.LONGEST[torch.bfloat16]
    for gates in (False, True):
        sizes = (3, 1024, 24)
        wanted = both(*leaves(*sizes, dtype=torch.float64, gates=gates), "fft")
        for name, backend, most in (
            ("tiles", "triton", 1 << 30),
            ("transforms", "triton", 16),
            ("torch.fft", "fft", 16),
        ):
            crossover.LONGEST[torch.bfloat16] = most
            given, dy = leaves(*sizes, gates=gates)
            found = both(given, dy, backend)
            errors = {
                n: f"{relative(a.detach(), e.detach()):.2e}"
                for n, a, e in zip(["y", *given], found, wanted, strict=True)
            }
            print(f"errors, gates {gates}, {name}: {errors}", flush=True)
    crossover.LONGEST[torch.bfloat16] = longest


def time_child(skipped):
    """Times everything size by size; tells what is begun, so that the next child may go on after a wrong kernel."""
    seen = set(map(tuple, skipped))
    if not any(part for part, _, _ in seen):
        errors_of_operator()
    for part, call in ORDER:
        for name, fn in globals()[part](call).items():
            if (part, call, name) in seen or ("", -1, name) in seen:
                continue
            print(json.dumps({"begun": [part, call, name]}), flush=True)
            try:
                ms = fn() if part == "whole_times" else graph_ms(fn)
            except Exception as failure:
                ms = f"{type(failure).__name__} {failure}"[-150:]
                if "CUDA error" in ms or "illegal" in ms:
                    raise
            print(json.dumps({"name": name, "B, T": CALLS[call], "ms": ms}), flush=True)
        fn = None
        torch.cuda.empty_cache()


def follow(arguments, seconds, show):
    """Runs a child, shows its lines as they come, ends it after `seconds`; returns its JSON lines and last error."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), *arguments], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        watch = threading.Timer(max(seconds, 1), process.kill)
        watch.start()
        found = []
        for line in process.stdout:
            if line.startswith("{"):
                found.append(json.loads(line))
            if show and '"begun"' not in line:
                print(line, end="", flush=True)
        process.wait()
        watch.cancel()
        errors.seek(0)
        return found, process.returncode, (errors.read().strip().splitlines() or [""])[-1][:200]


def main(budget=57.0, workers=11):
    begin = time.time()
    left = lambda: budget - (time.time() - begin)
    results = {case: {} for case in CASES}

    def check(todo):
        while todo and left() > 37:
            found, _, err = follow(["--check", json.dumps(todo)], left() - 35, False)
            for line in found:
                if "case" in line:
                    results[tuple(line["case"])].update({k: v for k, v in line.items() if k != "case"})
            begun = [tuple(line["begun"]) for line in found if "begun" in line]
            if not begun:
                results[todo[0]]["failed"] = "not begun: " + err
                return
            if not results[begun[-1]]:
                results[begun[-1]]["failed"] = "died: " + err
            todo = [case for case in todo if case not in begun]

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(check, [CASES[w::workers] for w in range(workers)]))
    print(f"checked after {time.time() - begin:.0f} s", flush=True)
    skipped = []
    for (kind, i), found in results.items():
        name = f"{kind} " + " ".join(map(str, (PRODUCTS if kind == "product" else PAIRS)[i]))
        print(f"{name}: {found}", flush=True)
        if found.get("error", 1.0) > 1e-2:
            skipped.append(("", -1, name))
    times, code = [], 1
    while code and left() > 5:
        found, code, err = follow(["--time", json.dumps(skipped)], left(), True)
        begun = [tuple(line["begun"]) for line in found if "begun" in line]
        times += [line for line in found if "ms" in line]
        if code:
            print("timing ended at", begun[-1:], err, flush=True)
        if not begun:
            break
        skipped += begun
    with open(f"{os.environ.get('OUT', tempfile.mkdtemp())}/long_engine.json", "w") as file:
        listed = [{"kind": k, "number": i} | r for (k, i), r in results.items()]
        json.dump({"checks": listed, "times": times, "device": torch.cuda.get_device_name()}, file)
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    mode = sys.argv[1] if len(sys.argv) > 1 else ""
    if mode == "--check":
        check_child([tuple(case) for case in json.loads(sys.argv[2])])
    elif mode == "--time":
        time_child(json.loads(sys.argv[2]))
    else:
        main()

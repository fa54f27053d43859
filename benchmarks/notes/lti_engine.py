"""The diagonal scan and the kernels of S4D: checks and times the product at several block sizes in one run.

    OUT=dir python benchmarks/notes/lti_engine.py                   the whole run (GPU); JSON to $OUT/lti_engine.json
    TRITON_INTERPRET=1 python benchmarks/notes/lti_engine.py --interpret      the checks alone, small, on a CPU

A variant says what it changes of zoo/ops/lti/kernels/wide_launch.py. Counts and predictions: lti.md.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time

import torch
from zoo.ops.lti import lti_kernel, lti_scan, vandermonde
from zoo.ops.lti.kernels import levels, scan, wide_launch
from zoo.ops.lti.kernels.wide_launch import Size
from zoo.ops.lti_attention import lti_attention

ROWS = {"B8 D2048 T4096": (8, 2048, 4096), "B2 D2048 T16384": (2, 2048, 16384), "B1 D1024 T65536": (1, 1024, 65536)}
VARIANTS = {
    "wide": {},
    "rows of 256": {"segments": (64, 256)},
    "turned": None,  # kernels that read transposed copies
    "rows of 512": {"segments": (64, 512)},
    "rows of 128": {"segments": (64, 128)},
    "rows of 256, 512 programs": {"segments": (64, 256), "programs": 512},
    "mix of 16 channels": {"mix": Size(wide=16, stages=2)},
}
KERNELS = {"s4d_kernel D1024 T4096": (1024, 4096), "s4d_kernel D1024 T16384": (1024, 16384)}
MOMENTS = [levels.MOMENT, (16, 128, 8, 3), (32, 64, 4, 2), (16, 64, 4, 3)]  # lags of a program, warps, stages
WHOLE, SHORT = (2, 64, 1024), (2, 64, 1000)  # batch, channels, tokens: whole chunks, and a short one
PLACES = [(WHOLE, True, True), (SHORT, True, False), (WHOLE, False, False), (SHORT, False, True)]  # ahead, packed
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 2e-3}
PROGRAMS, SEGMENTS, SIZES = wide_launch.PROGRAMS, wide_launch.SEGMENTS, dict(wide_launch.SIZES)
CHECKS = [("wide", torch.bfloat16, *place) for place in PLACES]
CHECKS += [("wide", dtype, *place) for dtype in (torch.float32, torch.float16) for place in PLACES[:2]]
CHECKS += [(name, torch.bfloat16, *PLACES[0]) for name in VARIANTS if name != "wide"]


def modes(channels, device, count=32):
    made = torch.Generator().manual_seed(1)
    step = torch.exp(torch.rand(channels, 1, generator=made) * math.log(100.0) + math.log(0.001))
    log_a = torch.stack((-0.5 * step.expand(-1, count), step * math.pi * torch.arange(count)), -1)
    c = torch.randn(channels, count, 2, generator=made) * (0.5 / count) ** 0.5 * step[..., None]
    return log_a.to(device), c.to(device)


def draw(batch, channels, tokens, device, dtype):
    made = torch.Generator(device).manual_seed(3)
    log_a, c = modes(channels, device)
    x, dy = (torch.randn(batch, tokens, channels, generator=made, device=device).to(dtype) for _ in range(2))
    return {"x": x, "log_a": log_a, "c": c}, dy


def run(given, dy, backend, dfinal=None, **options):
    leaves = {name: part.detach().requires_grad_() for name, part in given.items()}
    y, final = lti_scan(**leaves, backend=backend, **options)
    outputs, cotangents = ([y], [dy]) if dfinal is None else ([y, final], [dy, dfinal])
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return {"y": y.detach(), "final": final.detach()} | {"d" + k: g for k, g in zip(leaves, grads)}


def relative(value, exact):
    value, exact = value.detach(), exact.detach()
    return float((value.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def check(device, dtype, shape, ahead, packed):
    """Relative root mean square of the error of each result against float64, with every option."""
    batch, channels, tokens = shape
    batch = 1 if packed else batch
    given, dy = draw(batch, channels, tokens, device, dtype)
    ends = torch.tensor([0, tokens // 3, tokens // 3, tokens], device=device) if packed else None
    sequences = 3 if packed else batch
    given["D"] = torch.ones(channels, device=device)
    given["initial_state"] = torch.randn(sequences, *given["c"].shape, device=device)
    if ahead:
        given["c_reverse"] = given["c"].flip(1)
    dfinal = torch.randn(sequences, *given["c"].shape, device=device)
    options = {"cu_seqlens": ends, "reverse_lag": 1 if ahead else 0}
    wide = {name: part.double() for name, part in given.items()}
    exact = run(wide, dy.double(), "chunked", dfinal.double(), **options)
    got = run(given, dy, "triton", dfinal, **options)
    return {name: relative(value, exact[name]) for name, value in got.items()}


def judge(device, dtype, shape, ahead, packed, bound, name=""):
    label = f"{name} {str(dtype)[6:]} T{shape[2]} ahead={ahead} packed={packed}"
    try:
        errors = check(device, dtype, shape, ahead, packed)
    except Exception as error:  # the other checks go on
        print("BAD", label, f"{type(error).__name__} {error}"[:300], flush=True)
        return
    bad = {name: error for name, error in errors.items() if not error < bound}
    shown = {name: f"{error:.1e}" for name, error in (bad or errors).items()}
    print("ok " if not bad else "BAD", label, shown, flush=True)


def check_small():
    """On a CPU. The interpreter cuts off what bfloat16 does not hold: twice the error of rounding."""
    for dtype, bound in BOUNDS.items():
        channels = 16 if dtype == torch.bfloat16 else 2
        for tokens, ahead, packed in ((128, False, False), (70, True, False), (150, True, True)):
            shape = (2, channels, tokens)
            judge("cpu", dtype, shape, ahead, packed, 1e-2 if dtype == torch.bfloat16 else bound)


def check_kernel(device, channels, length):
    """Errors against float64, with cuBLAS allowed to round to TF32: these products are not its."""
    torch.backends.cuda.matmul.allow_tf32 = True
    if device == "cpu":
        vandermonde._by_kernels = lambda tensor, dtype: dtype == torch.float32
    log_a, c = modes(channels, device)
    dk = torch.randn(channels, length, generator=torch.Generator(device).manual_seed(2), device=device)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [part.to(dtype).requires_grad_() for part in (log_a, c)]
        k = lti_kernel(*leaves, length)
        results.append([k, *torch.autograd.grad(k, leaves, dk.to(dtype))])
    return {n: relative(a, b) for n, a, b in zip(("k", "dlog_a", "dc"), *results)}


def use(name):
    changed = VARIANTS[name]
    scan.wide_serves = (lambda *_: False) if changed is None else wide_launch.wide_serves
    wide_launch.PROGRAMS = (changed or {}).get("programs", PROGRAMS)
    wide_launch.SEGMENTS = (changed or {}).get("segments", SEGMENTS)
    for kernel, size in SIZES.items():
        wide_launch.SIZES[kernel] = (changed or {}).get(kernel, size)


def bench(function, repeats=12):
    """Milliseconds (median): eager from the host, and inside a CUDA graph."""

    def times(call):
        found = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end))
        return sorted(found)[repeats // 2]

    for _ in range(3):
        function()
    torch.cuda.synchronize()
    eager = times(function)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    torch.cuda.synchronize()
    return round(eager, 4), round(times(graph.replay), 4)


def calls(shape):
    given, dy = draw(*shape, "cuda", torch.bfloat16)
    leaves = {name: part.requires_grad_() for name, part in given.items()}

    def both():
        y, _ = lti_scan(**leaves, backend="triton")
        return torch.autograd.grad(y, list(leaves.values()), dy)

    def ahead():
        with torch.no_grad():
            return lti_scan(**leaves, backend="triton")

    return ahead, both


def kernel_calls(channels, length):
    leaves = [part.requires_grad_() for part in modes(channels, "cuda")]
    dk = torch.randn(channels, length, device="cuda")

    def both():
        return torch.autograd.grad(lti_kernel(*leaves, length), leaves, dk)

    def ahead():
        with torch.no_grad():
            return lti_kernel(*leaves, length)

    return ahead, both


def attention_calls():
    """H3 with heads of 64 channels: B1 T4096, 32 heads, 32 modes."""
    log_a, c = (part.requires_grad_() for part in modes(32, "cuda"))
    leaves = [torch.randn(1, 4096, 32, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    dy = torch.randn_like(leaves[0])

    def both():
        return torch.autograd.grad(lti_attention(*leaves, log_a, c)[0], [*leaves, log_a, c], dy)

    def ahead():
        with torch.no_grad():
            return lti_attention(*leaves, log_a, c)

    return ahead, both


def profile(function):
    """Microseconds of each kernel on the device in one call, and how many were launched."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    function()
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        function()
        torch.cuda.synchronize()
    events = [event for event in seen.key_averages() if event.self_device_time_total]
    found = {event.key[:70]: (event.count, round(event.self_device_time_total, 1)) for event in events}
    return dict(sorted(found.items(), key=lambda item: -item[1][1])[:14])


def children():
    """Compilation and checks, side by side, what most variants share first; what runs after 48 s is ended."""
    compiled = [("--compile", row, name) for row in ("B8 D2048 T4096", "B1 D1024 T65536") for name in VARIANTS]
    checks = [("--check", str(i)) for i in range(len(CHECKS))]
    kernels = [("--attention",)] + [("--kernels", str(i)) for i in range(len(MOMENTS))]
    jobs = compiled[:7] + checks[:2] + kernels + compiled[7:] + checks[2:]
    running, begun = [], time.time()
    while jobs or running:
        running = [child for child in running if child.poll() is None]
        while jobs and len(running) < 15:
            running.append(subprocess.Popen([sys.executable, __file__, *jobs.pop(0)]))
        if time.time() - begun > 48:
            print(f"left out after 48 s: {len(running)} running, {len(jobs)} not begun: {jobs}", flush=True)
            for child in running:
                child.kill()
            return
        time.sleep(0.1)


def memory(shape):
    """MiB beyond the inputs at the peak of a forward, and of a forward and backward."""
    peaks = []
    for call in calls(shape):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        kept = call()
        peaks.append((torch.cuda.max_memory_allocated() - held) >> 20)
        del kept
    return peaks


def show(title, found):
    print(title)
    for kernel, (count, us) in found.items():
        print(f"   {us:9.1f} us {count:3d}x {kernel}", flush=True)


def main():
    out, begun = os.environ.get("OUT", "."), time.time()
    result = {"device": torch.cuda.get_device_name(), "times": {}, "profiles": {}}
    children()
    print(f"checked and compiled after {time.time() - begun:.0f} s", flush=True)
    for row, shape in ROWS.items():
        for name in VARIANTS if row[:2] != "B2" and time.time() - begun < 62 else list(VARIANTS)[:2]:
            use(name)
            try:
                times = [bench(call) for call in calls(shape)]
            except Exception as error:  # the run goes on with the others
                times = f"{type(error).__name__} {error}"[:200]
            result["times"][f"{row} {name}"] = times
            print(f"{row}, {name}: fwd, f+b (eager, graph) {times}", flush=True)
        use("wide")
        print(row, "extra memory MiB", memory(shape), flush=True)
        result["profiles"][row] = profile(calls(shape)[1])
        show(row, result["profiles"][row])
    for name, size in KERNELS.items():
        for levels.MOMENT in reversed(MOMENTS if size[1] > 4096 else MOMENTS[:1]):
            errors = {part: f"{error:.1e}" for part, error in check_kernel("cuda", 64, size[1]).items()}
            times = [bench(call) for call in kernel_calls(*size)]
            result["times"][f"{name} {levels.MOMENT}"] = times
            print(f"{name} {levels.MOMENT} {errors}: fwd, f+b (eager, graph) {times}", flush=True)
    result["profiles"]["s4d"] = profile(kernel_calls(1024, 16384)[1])
    show("s4d", result["profiles"]["s4d"])
    result["times"]["lti_attention"] = [bench(call) for call in attention_calls()]
    print("lti_attention P64 B1 T4096: fwd, f+b (eager, graph)", result["times"]["lti_attention"], flush=True)
    result["profiles"]["lti_attention"] = profile(attention_calls()[1])
    show("lti_attention", result["profiles"]["lti_attention"])
    row, shape = next(iter(ROWS.items()))
    for name in list(VARIANTS)[1:]:
        if time.time() - begun > 68:
            break
        use(name)
        result["profiles"][f"{row} {name}"] = profile(calls(shape)[1])
        show(f"{row} {name}", result["profiles"][f"{row} {name}"])
    with open(f"{out}/lti_engine.json", "w") as file:
        json.dump(result, file, indent=1)
    print(f"{time.time() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    if "--interpret" in sys.argv:
        check_small()
        print(check_kernel("cpu", 2, 300))
    elif "--check" in sys.argv:
        name, *chosen = CHECKS[int(sys.argv[-1])]
        use(name)
        judge("cuda", *chosen, BOUNDS[chosen[0]], name)
    elif "--attention" in sys.argv:
        attention_calls()[1]()
        torch.cuda.synchronize()
    elif "--kernels" in sys.argv:
        levels.MOMENT = MOMENTS[int(sys.argv[-1])]
        for size in KERNELS.values():
            check_kernel("cuda", 64, size[1])
            kernel_calls(*size)[1]()
        torch.cuda.synchronize()
    elif "--compile" in sys.argv:
        use(sys.argv[-1])
        calls(ROWS[sys.argv[-2]])[1]()
        torch.cuda.synchronize()
    else:
        main()

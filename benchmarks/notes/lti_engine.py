"""The diagonal scan and the kernels of S4D: checks and times the product at several block sizes in one run.

    OUT=dir python benchmarks/notes/lti_engine.py                   the whole run (GPU); JSON to $OUT/lti_engine.json
    TRITON_INTERPRET=1 python benchmarks/notes/lti_engine.py --interpret      the checks alone, small, on a CPU

A variant is (warps, stages of the loop over chunks, longest segment). Counts and predictions: lti.md.
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
from zoo.ops.lti.kernels import launch

ROWS = {"B8 D2048 T4096": (8, 2048, 4096), "B2 D2048 T16384": (2, 2048, 16384), "B1 D1024 T65536": (1, 1024, 65536)}
VARIANTS = [(8, 3, 1024), (8, 2, 1024), (8, 4, 1024), (8, 3, 256)]
KERNELS = {"s4d_kernel D1024 T4096": (1024, 4096), "s4d_kernel D1024 T16384": (1024, 16384)}
WHOLE, SHORT = (2, 64, 1024), (2, 64, 1000)  # batch, channels, tokens: whole chunks, and a short one
PLACES = [(WHOLE, False, False), (WHOLE, True, False), (SHORT, True, False), (WHOLE, True, True)]  # ahead, packed
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 2e-3}
CHECKS = [(dtype, *place) for dtype in BOUNDS for place in PLACES]


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


def judge(device, dtype, shape, ahead, packed, bound):
    label = f"{str(dtype)[6:]} T{shape[2]} ahead={ahead} packed={packed}"
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
        for shape, ahead, packed in (((2, 2, 128), False, False), ((1, 2, 70), True, False), ((1, 2, 70), True, True)):
            judge("cpu", dtype, shape, ahead, packed, 1e-2 if dtype == torch.bfloat16 else bound)


def check_kernel(device, channels, length):
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


def use(variant):
    launch.WARPS, launch.STAGES, longest = variant
    launch.SEGMENTS = (64, longest)


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
    return dict(sorted(found.items(), key=lambda item: -item[1][1])[:16])


def main():
    out, begun = os.environ.get("OUT", "."), time.time()
    result = {"device": torch.cuda.get_device_name(), "times": {}, "profiles": {}}
    children = [("--compile", i) for i in range(len(VARIANTS))] + [("--check", i) for i in range(len(CHECKS))]
    started = [subprocess.Popen([sys.executable, __file__, kind, str(i)]) for kind, i in children]
    for child in started:
        child.wait()
    print(f"checked and compiled after {time.time() - begun:.0f} s", flush=True)
    for name, size in KERNELS.items():
        errors = check_kernel("cuda", 64, size[1])
        result["times"][name] = [bench(call) for call in kernel_calls(*size)]
        print(name, errors, "fwd, f+b (eager, graph)", result["times"][name], flush=True)
    result["profiles"]["s4d"] = profile(kernel_calls(1024, 16384)[1])
    for name, shape in ROWS.items():
        for variant in VARIANTS[: None if time.time() - begun < 60 else 1]:
            use(variant)
            try:
                times = [bench(call) for call in calls(shape)]
            except Exception as error:  # the run goes on with the others
                times = f"{type(error).__name__} {error}"[:200]
            result["times"][f"{name} {variant}"] = times
            print(f"{name} warps, stages, segment {variant}: fwd, f+b (eager, graph) {times}", flush=True)
        use(VARIANTS[0])
        torch.cuda.reset_peak_memory_stats()
        ahead, both = calls(shape)
        held = torch.cuda.memory_allocated()
        kept = ahead()
        peaks = [torch.cuda.max_memory_allocated() - held]
        del kept
        torch.cuda.reset_peak_memory_stats()
        both()
        peaks.append(torch.cuda.max_memory_allocated() - held)
        print(name, "extra memory MiB", [p >> 20 for p in peaks], flush=True)
        result["profiles"][name] = profile(both)
    for name, found in result["profiles"].items():
        print(name)
        for kernel, (count, us) in found.items():
            print(f"   {us:9.1f} us {count:3d}x {kernel}")
    with open(f"{out}/lti_engine.json", "w") as file:
        json.dump(result, file, indent=1)
    print(f"{time.time() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    if "--interpret" in sys.argv:
        check_small()
        print(check_kernel("cpu", 2, 300))
    elif "--check" in sys.argv:
        chosen = CHECKS[int(sys.argv[-1])]
        judge("cuda", *chosen, BOUNDS[chosen[0]])
    elif "--compile" in sys.argv:
        use(VARIANTS[int(sys.argv[-1])])
        for shape in ROWS.values():
            calls(shape)[1]()
        torch.cuda.synchronize()
    else:
        main()

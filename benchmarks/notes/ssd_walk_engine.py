"""SSD forward by walks: checks and times the walk and the march, with its settings of each width, in one run.

    python benchmarks/notes/ssd_walk_engine.py [seconds]    the whole run (GPU, 15 processes, 90 s); lines as they come,
                                                            JSON to $OUT/ssd_walk_engine.json
    PYTHONPATH=<triton 3.6> python ... --offline            registers, local memory, HGMMA for sm_90, no GPU

B8 T4096 H64 G1, bf16, with D, dt_bias, softplus; see `ssd.md` for bytes, products and predictions. Every variant is
compiled and checked in a process of its own (a wrong kernel may end it, a slow compiler is stopped), then timed in
another, one after the other. `all`: the operator's forward without its host; `before`: sums and scores alone.
"""

from __future__ import annotations

import json
import math
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
COMPILING = 60.0  # seconds for one variant's process

HALF = "half"
# size: (N, P). blocks: chunk, rows, parts, warps, stages, overlap, registers, dtype of scores; None for the walk.
VARIANTS = [
    ((128, 64), None),
    ((128, 64), (32, 64, 1, 4, 3, False, None)),
    ((128, 64), (32, 64, 1, 4, 3, True, None)),
    ((256, 64), None),
    ((256, 64), (32, 64, 2, 4, 2, False, None)),
    ((256, 16), None),
    ((256, 16), (32, 64, 2, 4, 2, False, None)),
    ((256, 32), None),
    ((256, 32), (32, 64, 2, 4, 2, False, None)),
    ((64, 64), None),
    ((64, 64), (32, 64, 1, 4, 3, False, 128)),
    ((16, 64), None),
    ((16, 64), (32, 64, 1, 4, 3, True, None)),
    ((128, 32), None),
    ((128, 32), (32, 64, 1, 4, 3, False, None)),
    ((128, 128), (32, 64, 1, 4, 3, False, None)),
]  # fmt: skip
MORE = [(16, 2048), (2, 16384), (1, 65536)]  # batch and tokens of the size (128, 64), for the best few


def blocks_of(blocks):
    from zoo.ops.ssd.kernels.march_launch import Blocks

    return Blocks(*(torch.bfloat16 if part == HALF else part for part in blocks))


def draw(batch, T, N, P, seed=0):
    H = 64 * 64 // P
    g = torch.Generator("cuda").manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, device="cuda", generator=g)
    return (
        r(batch, T, H, P).bfloat16(), (r(batch, T, H) * 0.5 - 2.0).bfloat16(),
        -torch.rand(H, device="cuda", generator=g) * 4,
        r(batch, T, 1, N).bfloat16(), r(batch, T, 1, N).bfloat16(), r(H), r(H) * 0.1,
    )  # fmt: skip


def forward(given, blocks):
    from zoo.ops.ssd.kernels import march_launch, walk

    rest = (True, (0.0, math.inf), None, None)
    if blocks is None:
        return walk.walked(*given, *rest)
    return march_launch.forward(*given, *rest, blocks_of(blocks))


def before(given, blocks):
    """What comes before the walk or the march."""
    from zoo.ops.semiseparable.kernels.chunks import chunks_of, decay_sums
    from zoo.ops.ssd.kernels import march_launch

    x, dt, A, B, C, _, bias = given
    if blocks is None:
        return decay_sums(chunks_of(x, None, 64), dt, A, bias, True, (0.0, math.inf))
    made = blocks_of(blocks)
    return march_launch.before(chunks_of(x, None, made.chunk), dt, A, B, C, bias, True, (0.0, math.inf), made.scores)


def relative(a, e):
    return float((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt())


def check_child(index):
    """Compiles one variant for whole and for broken chunks and compares it with float64."""
    from zoo.ops.ssd import ssd

    (N, P), blocks = VARIANTS[index]
    found = {}
    for T in (640, 601):
        given = draw(1, T, N, P)
        begin = time.time()
        y, final = forward(given, blocks)
        torch.cuda.synchronize()
        found["compiled"] = round(found.get("compiled", 0.0) + time.time() - begin, 1)
        x, dt, A, B, C, D, bias = (part.double() for part in given)
        exact, last = ssd(x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True, backend="chunked")
        found["error"] = max(found.get("error", 0.0), relative(y, exact), relative(final, last))
        same = forward(given, blocks)
        found["again"] = bool(torch.equal(same[0], y) and torch.equal(same[1], final)) and found.get("again", True)
    print(json.dumps(found), flush=True)


def graph_ms(fn, repeats=15):
    """Median time of a CUDA graph of one call."""
    fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = fn()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for i in range(repeats):
        marks[2 * i].record()
        graph.replay()
        marks[2 * i + 1].record()
    torch.cuda.synchronize()
    del kept
    return round(sorted(marks[2 * i].elapsed_time(marks[2 * i + 1]) for i in range(repeats))[repeats // 2], 4)


def time_child(cases, deadline):
    """cases: (variant, batch, tokens)."""
    for index, batch, T in cases:
        if time.time() > deadline:
            return
        (N, P), blocks = VARIANTS[index]
        given = draw(batch, T, N, P)
        found = {"case": [index, batch, T], "all": graph_ms(lambda: forward(given, blocks))}  # noqa: B023
        found["before"] = graph_ms(lambda: before(given, blocks))  # noqa: B023
        print(json.dumps(found), flush=True)


def child(arguments, seconds, see=lambda line: None):
    """Lines of JSON that a process prints, seen as they come, and the last line of its errors."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), *arguments], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        alarm = threading.Timer(max(seconds, 1), process.kill)
        alarm.start()
        found = []
        for line in process.stdout:
            if line.startswith("{"):
                found.append(json.loads(line))
                see(found[-1])
        stopped = process.wait() == -9
        alarm.cancel()
        errors.seek(0)
        said = (errors.read().strip().splitlines() or [""])[-1][:160]
    return found, said + (" (stopped)" if stopped else "")


def main(budget=90.0, workers=15):
    begin = time.time()
    left = lambda: budget - (time.time() - begin)
    results = {index: {} for index in range(len(VARIANTS))}

    def check(index):
        found, err = child(["--check", str(index)], min(COMPILING, left() - 25))
        results[index] = found[-1] if found else {"failed": err}
        print("checked", *VARIANTS[index], results[index], flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(check, results))
    print(f"checked after {time.time() - begin:.0f} s", flush=True)
    right = [i for i, found in results.items() if found.get("error", 1.0) < 2e-2 and found.get("again")]
    timed = {}

    def see(line):
        timed[tuple(line["case"])] = line
        index, batch, T = line["case"]
        spent = f"{line['all']:.4f} ms, before {line['before']:.4f}"
        print(f"{spent} | B{batch} T{T} N, P, blocks:", *VARIANTS[index], flush=True)

    def timings(todo):
        while todo and left() > 3:
            now, todo = todo[:6], todo[6:]
            found, err = child(["--time", json.dumps(now), str(begin + budget - 3)], left(), see)
            if len(found) < len(now):
                print("timing failed:", now[len(found)], err, flush=True)
                todo = now[len(found) + 1 :] + todo

    timings([(i, 8, 4096) for i in right])
    plain = [i for i in right if VARIANTS[i][0] == (128, 64) and (i, 8, 4096) in timed]
    best = sorted((timed[i, 8, 4096]["all"], i) for i in plain)[:3]
    timings([(i, batch, T) for batch, T in MORE for i in sorted({0} | {i for _, i in best}) if i in right])
    listed = [{"variant": VARIANTS[key[0]], "size": key[1:]} | results[key[0]] | line for key, line in timed.items()]
    kept = {"timed": listed, "checked": results, "device": torch.cuda.get_device_name()}
    with open(f"{os.environ.get('OUT', '/tmp')}/ssd_walk_engine.json", "w") as file:
        json.dump(kept, file)
    print(f"{time.time() - begin:.0f} s")


# ---------------------------------------------------------------------------------- without a GPU: the compiler


def compiled(size, blocks, even=True):
    """Registers, local memory, shared memory and matrix instructions of the march for sm_90; `serial` if ptxas waits
    after every one of them."""
    import re

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from zoo.ops.ssd.kernels.march import march_kernel
    from zoo.ops.ssd.kernels.march_launch import _constants

    (N, P), made = size, blocks_of(blocks)
    const = dict(_constants(made, 4096 // P, 1, N, P, True, False, False, even, True))
    options = {name: const.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in const}
    const |= {"start_ptr": None, "cu_ptr": None, "first_ptr": None}
    names = march_kernel.arg_names
    half = ("x_ptr", "B_ptr", "C_ptr", "y_ptr") + (("scores_ptr",) if made.scores == torch.bfloat16 else ())
    kind = lambda n: "*bf16" if n in half else "*fp32" if n.endswith("_ptr") else "i32"
    signature = {n: "constexpr" if n in const else kind(n) for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n.endswith("stride")]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(march_kernel, signature, {(names.index(n),): v for n, v in const.items()}, attrs)
    begin = time.time()
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    took = time.time() - begin
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cubin", "ptx"):
            with open(f"{folder}/k.{name}", "wb") as file:
                text = kernel.asm[name]
                file.write(text if isinstance(text, bytes) else text.encode())
        run = lambda *a: subprocess.run([f"{tools}/{a[0]}", *a[1:]], capture_output=True, text=True)
        usage = run("cuobjdump", "-res-usage", f"{folder}/k.cubin").stdout
        sass = run("nvdisasm", "-c", f"{folder}/k.cubin").stdout
        says = run("ptxas", "-arch=sm_90a", "-v", f"{folder}/k.ptx", "-o", "/dev/null").stderr
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]), "local": len(re.findall(r"\b(STL|LDL)", sass)),
        "shared_kb": round(kernel.metadata.shared / 1024, 1), "hgmma": sass.count("HGMMA"),
        "serial": "serialized" in says, "seconds": round(took, 1),
    }  # fmt: skip


if __name__ == "__main__":
    mode = sys.argv[1] if len(sys.argv) > 1 else ""
    if mode == "--check":
        check_child(int(sys.argv[2]))
    elif mode == "--time":
        time_child([tuple(case) for case in json.loads(sys.argv[2])], float(sys.argv[3]))
    elif mode == "--offline":
        for size, blocks in VARIANTS:
            if blocks is not None:
                for even in (True, False):
                    print(size, *blocks, "whole chunks" if even else "", "|", compiled(size, blocks, even), flush=True)
    else:
        main(*map(float, sys.argv[1:2]))

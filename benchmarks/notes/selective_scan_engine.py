"""Selective scan forward and backward: checks and times the product kernels at many block sizes in one run.

    OUT=dir python benchmarks/notes/selective_scan_engine.py        the whole run (GPU, 75 s); lines to $OUT/selective_scan_engine.txt too
    TRITON_INTERPRET=1 python ... --interpret                       every variant against float64, on a CPU
    PYTHONPATH=<triton 3.6> python ... --offline                    registers, stack, shared memory, instructions for sm_90

A variant is a row of zoo/ops/selective_scan/kernels/tuning.py (AHEAD or BACK at N = 16) and a distance of the kept states.
Counts and predictions: selective_scan.md.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import triton

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, "specs")]

from zoo.ops.selective_scan import selective_scan, triton_path
from zoo.ops.selective_scan.kernels import launch, launch_backward, tuning
from zoo.ops.selective_scan.kernels.tuning import Blocks

E, N = 4096, 16
ROWS = {"B8 T4096": (8, 4096), "B2 T16384": (2, 16384)}
CHECKS = {"whole": (2, 150), "cut": (2, 600)}  # one segment a sequence, and three
AHEAD, BACK = dict(tuning.AHEAD), dict(tuning.BACK)
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def ahead(tiles, e, tile, warps, resident, chunk=64, touch=False):
    return "forward", Blocks(tiles, N // tiles, e, tile, warps, resident, touch), chunk


def back(tiles, e, tile, warps, resident=8, chunk=64, touch=False):
    return "backward", Blocks(tiles, N // tiles, e, tile, warps, resident, touch), chunk


VARIANTS = [
    ahead(4, 32, 4, 1, 12, touch=True), back(1, 32, 2, 1, touch=True), back(2, 32, 2, 1, touch=True),
    back(1, 32, 2, 1, chunk=32, touch=True), back(2, 32, 2, 1, chunk=32, touch=True), back(1, 32, 4, 1, chunk=32),
    back(4, 32, 2, 1, chunk=32, touch=True), ahead(4, 32, 8, 1, 12, touch=True), ahead(4, 32, 2, 1, 12, touch=True),
    ahead(4, 32, 4, 1, 12, chunk=32, touch=True),
]  # fmt: skip


def draw(batch, tokens, channels=E, device="cuda", dtype=torch.bfloat16):
    made = torch.Generator(device).manual_seed(5)
    rand = lambda *shape: torch.randn(shape, generator=made, device=device)
    wide = (batch, tokens, channels)
    return {
        "x": rand(*wide).to(dtype), "dt": rand(*wide).to(dtype), "A": -torch.arange(1.0, N + 1, device=device).repeat(channels, 1),
        "B": rand(batch, tokens, 1, N).to(dtype), "C": rand(batch, tokens, 1, N).to(dtype), "D": rand(channels), "z": rand(*wide).to(dtype),
        "dt_bias": rand(channels) - 3.0, "dy": rand(*wide).to(dtype),
    }  # fmt: skip


def exact(given):
    """y and gradients of all inputs in float64 by the plain path."""
    leaves = {name: given[name].double().requires_grad_() for name in NAMES}
    rest = {name: leaves[name] for name in NAMES[5:]}
    y, _ = selective_scan(*(leaves[n] for n in NAMES[:5]), **rest, dt_softplus=True, backend="chunked")
    grads = torch.autograd.grad(y, list(leaves.values()), given["dy"].double())
    return {"y": y.detach()} | {"d" + name: grad for name, grad in zip(NAMES, grads)}


def relative(a, e):
    return float((a.double() - e.to(a.device)).square().mean().sqrt() / e.square().mean().sqrt())


def use(variant):
    """Put a variant in place of the product's row, with its CHUNK for both directions; the other direction is the product's."""
    kind, blocks, chunk = variant
    triton_path.CHUNK = chunk
    (tuning.BACK if kind == "forward" else tuning.AHEAD)[N] = (BACK if kind == "forward" else AHEAD)[N]
    (tuning.AHEAD if kind == "forward" else tuning.BACK)[N] = blocks


def arguments(given):
    return (*(given[name] for name in NAMES), None, None, True)


def errors(variant, given, expected):
    use(variant)
    y, _, states = launch.forward(*arguments(given))
    if variant[0] == "forward":
        return {"y": relative(y, expected["y"])} if expected else {}
    grads = launch_backward.backward(given["dy"], None, states, *arguments(given))
    torch.cuda.synchronize() if given["x"].is_cuda else None
    return {} if expected is None else {"d" + name: relative(grad, expected["d" + name]) for name, grad in zip(NAMES, grads)}


def right(found):
    loose = {"dA", "dD", "ddt_bias"}  # float32 sums
    return all(e == e and e < (1e-3 if k in loose else 4e-3) for k, e in found.items())


def median(run):
    return triton.testing.do_bench(run, warmup=8, rep=30, return_mode="median")


def say(*parts):
    print(*parts, flush=True)


def variant_child(i, folder):
    """Compile, check against float64 and time one variant; the GPU is one child's at a time while it is timed."""
    variant = VARIANTS[i]
    kind, b, chunk = variant
    line = f"{kind:8} tiles {b.tiles} e {b.e} tile {b.tile} warps {b.warps} resident {b.resident} chunk {chunk} touch {int(b.touch)} |"
    given = {name: draw(*size) for name, size in CHECKS.items()}
    begin = time.time()
    errors(variant, given["cut"], None)
    line += f" {time.time() - begin:.0f} s |"
    while not os.path.exists(f"{folder}/exact.pt"):
        time.sleep(0.1)
    expected = torch.load(f"{folder}/exact.pt")
    found = {name: errors(variant, given[name], expected[name]) for name in given}
    worst = max((e if e == e else 9e9, k) for by in found.values() for k, e in by.items())
    line += f" {worst[0]:.1e} {worst[1]} {'ok' if all(map(right, found.values())) else 'WRONG'} |"
    with open(f"{folder}/turn", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for name, size in ROWS.items():
            given = draw(*size)
            inputs = arguments(given)
            if kind == "forward":
                run = lambda: launch.forward(*inputs)
            else:
                states = launch.forward(*inputs)[2]
                run = lambda: launch_backward.backward(given["dy"], None, states, *inputs)
            run()
            line += f" {name}: {median(run):.3f} ms"
            torch.cuda.empty_cache()
    say(line)


def whole_child(i, folder):
    """Forward, and forward and backward, of the product operator with its own table, and its memory beyond the inputs."""
    line = "product  |"
    given = draw(*CHECKS["cut"])
    y, _, states = launch.forward(*arguments(given))
    launch_backward.backward(given["dy"], None, states, *arguments(given))
    with open(f"{folder}/turn", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for name, size in ROWS.items():
            given = draw(*size)
            leaves = {n: given[n].requires_grad_() for n in NAMES}

            def run():
                y, _ = selective_scan(*(leaves[n] for n in NAMES[:5]), **{n: leaves[n] for n in NAMES[5:]}, dt_softplus=True, backend="triton")
                torch.autograd.grad(y, list(leaves.values()), given["dy"])

            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            mib = (torch.cuda.max_memory_allocated() - before) >> 20
            line += f" {name}: both {median(run):.3f} ms {mib} MiB"
    say(line)


def exact_child(_, folder):
    torch.save({name: exact(draw(*size)) for name, size in CHECKS.items()}, f"{folder}/part.pt")
    os.rename(f"{folder}/part.pt", f"{folder}/exact.pt")


def main(budget=75.0):
    begin = time.time()
    folder = tempfile.mkdtemp()
    path = os.path.join(os.environ.get("OUT", folder), "selective_scan_engine.txt")
    jobs = [("--exact", 0)] + [("--variant", i) for i in range(len(VARIANTS))] + [("--product", 0)]

    def run(job):
        mode, i = job
        what = f"{mode} {VARIANTS[i] if mode == '--variant' else ''}"
        process = subprocess.Popen([sys.executable, os.path.abspath(__file__), mode, str(i), folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, err = process.communicate(timeout=max(budget - 3 - (time.time() - begin), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = "", "no time left"
        if process.returncode:
            out += f"{what} failed: {(err.strip().splitlines() or [''])[-1][:200]}\n"
        with open(path, "a") as file:
            file.write(out)
        if out:
            say(f"{time.time() - begin:3.0f} s {out.strip()}")

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(run, jobs))
    say(f"{torch.cuda.get_device_name()}, {time.time() - begin:.0f} s")


# ----------------------------------------------------------------------------------------------------------- without a GPU


def interpret(only):
    worst = 0.0
    given = draw(1, 19, 40, "cpu", torch.float32)
    expected = exact(given)
    for i, (kind, blocks, _) in enumerate(VARIANTS):
        if only and str(i) not in only:
            continue
        for shortest in (16, 64):
            tuning.SHORTEST_SEGMENT = shortest
            found = errors((kind, blocks, 16), given, expected)
            worst = max(worst, *found.values())
            print(i, kind, blocks, "cut" if shortest == 16 else "whole", f"{max(found.values()):.1e}", flush=True)
    print("worst", worst)
    return worst > 1e-5


def compiled(kernel, const, given, warps):
    """Registers, stack, shared memory, and instructions of each loop of one kernel for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in const else given.get(name, "*fp32") for name in names}
    aligned = [n for n in names if signature[n].startswith("*") or n.endswith("_stride")]
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in const.items()}, {(names.index(n),): [["tt.divisibility", 16]] for n in aligned})
    k = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(k.asm["cubin"])
        file.flush()
        usage = subprocess.run([f"{tools}/cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        sass = subprocess.run([f"{tools}/nvdisasm", "-c", file.name], capture_output=True, text=True).stdout.splitlines()
    labels, loops = {}, []
    for number, line in enumerate(sass):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = number
        elif (jump := re.search(r"BRA.*\((\.L_x_\d+)\)", line)) and labels.get(jump[1], number) < number - 40:
            body = [re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", row) for row in sass[labels[jump[1]] : number + 1]]
            ops = [found[1] for found in body if found]
            loops.append({"all": len(ops)} | {op: ops.count(op) for op in ("MUFU", "SHFL", "BAR", "LDL", "STL", "LDS", "STS", "LDG")})
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    return dict(registers=int(found[1]), stack=int(found[2]), shared=k.metadata.shared, loops=loops)


def offline(variant):
    from zoo.ops.selective_scan.kernels.forward import scan_kernel
    from zoo.ops.selective_scan.kernels.gradients import gradient_kernel

    kind, b, chunk = variant
    given = {f"{n}_ptr": "*bf16" for n in ("x", "dt", "z", "y", "dy", "dx", "ddt", "dz")} | {f"{n}_stride": "i32" for n in ("x", "dt", "z", "dy")}
    given |= {n: "i32" for n in ("T", "pieces", "SEGMENT", "slab", "SLAB", "rows")}
    const = dict(E=E, G=1, N=N, HAS_D=True, HAS_Z=True, HAS_BIAS=True, HAS_INITIAL=False, HAS_GIVEN=False, SOFTPLUS=True, SPLIT=kind == "backward", PACKED=False)
    const |= dict(CHUNK=chunk, TOUCH=b.touch, TILE=b.tile, TILES=b.tiles, ROWS=b.rows, BLOCK_E=b.e)
    const |= dict.fromkeys(("initial_ptr", "entering_ptr", "owner_ptr", "cu_ptr", "dfinal_ptr", "dinitial_ptr"))
    kernel = scan_kernel if kind == "forward" else gradient_kernel
    return compiled(kernel, {n: v for n, v in const.items() if n in kernel.arg_names}, given, b.warps)


if __name__ == "__main__":
    mode = sys.argv[1] if len(sys.argv) > 1 else ""
    if mode in ("--variant", "--product", "--exact"):
        {"--variant": variant_child, "--product": whole_child, "--exact": exact_child}[mode](int(sys.argv[2]), sys.argv[3])
    elif mode == "--interpret":
        sys.exit(interpret(sys.argv[2:]))
    elif mode == "--offline":
        for i, variant in enumerate(VARIANTS):
            if len(sys.argv) < 3 or str(i) in sys.argv[2:]:
                begin = time.time()
                print(i, *variant, offline(variant), f"{time.time() - begin:.0f} s", flush=True)
    else:
        main()

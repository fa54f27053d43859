"""Selective scan forward and backward: checks and times the product kernels at many block sizes in one run.

    OUT=dir python benchmarks/notes/selective_scan_engine.py        the whole run (GPU); JSON to $OUT/selective_scan_engine.json
    TRITON_INTERPRET=1 python ... --interpret                       every variant against float64, on a CPU
    PYTHONPATH=<triton 3.6> python ... --offline                    registers, stack, shared memory, instructions for sm_90

A variant is a row of zoo/ops/selective_scan/kernels/tuning.py (AHEAD or BACK at N = 16) and a distance of the kept states.
Counts and predictions: selective_scan.md.
"""

from __future__ import annotations

import json
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


def ahead(tiles, e, tile, warps, resident, chunk=64):
    return "forward", Blocks(tiles, N // tiles, e, tile, warps, resident), chunk


def back(tiles, e, tile, warps, resident=8, chunk=64):
    return "backward", Blocks(tiles, N // tiles, e, tile, warps, resident), chunk


VARIANTS = [
    ahead(4, 32, 8, 1, 12), ahead(4, 32, 4, 1, 16), ahead(4, 32, 4, 1, 8), ahead(2, 32, 8, 1, 12), ahead(1, 32, 8, 1, 12),
    ahead(4, 64, 8, 2, 12), ahead(4, 128, 8, 4, 12), ahead(4, 32, 8, 1, 8), ahead(4, 32, 2, 1, 20), ahead(1, 64, 4, 1, 8),
    back(1, 32, 4, 1), back(1, 32, 2, 1), back(4, 32, 2, 1), back(2, 32, 4, 1), back(2, 32, 2, 1),
    back(1, 64, 4, 2), back(1, 128, 4, 4), back(1, 128, 2, 4), back(4, 128, 2, 4), back(2, 128, 2, 4),
    back(1, 32, 4, 1, 16), back(1, 32, 2, 1, 16), back(1, 32, 4, 1, chunk=128), back(4, 32, 2, 1, chunk=32), back(1, 32, 2, 1, chunk=32),
    back(1, 32, 1, 1, 12, chunk=32),
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
        return {"y": relative(y, expected["y"])}
    grads = launch_backward.backward(given["dy"], None, states, *arguments(given))
    return {"d" + name: relative(grad, expected["d" + name]) for name, grad in zip(NAMES, grads)}


def right(found):
    loose = {"dA", "dD", "ddt_bias"}  # float32 sums
    return all(e == e and e < (1e-3 if k in loose else 4e-3) for k, e in found.items())


def check_child(indices, folder):
    data = torch.load(f"{folder}/exact.pt")
    for i in indices:
        print(json.dumps({"index": i, "begun": True}), flush=True)
        try:
            found = {name: errors(VARIANTS[i], *pair) for name, pair in data.items()}
            torch.cuda.synchronize()
            print(json.dumps({"index": i, "errors": found}), flush=True)
        except Exception as error:  # the run goes on with the other variants
            text = f"{type(error).__name__} {error}"[:200].replace("\n", " ")
            print(json.dumps({"index": i, "failed": text}), flush=True)
            if "illegal" in text.lower():
                return


def median(run):
    return triton.testing.do_bench(run, warmup=8, rep=30, return_mode="median")


def time_child(indices, until):
    data = {name: draw(*size) for name, size in ROWS.items()}
    for i in indices:
        if time.time() > until:
            return
        line = {"index": i, "ms": {}, "MiB": {}}
        use(VARIANTS[i])
        for name, given in data.items():
            inputs = arguments(given)
            if VARIANTS[i][0] == "forward":
                run = lambda: launch.forward(*inputs)
            else:
                states = launch.forward(*inputs)[2]
                run = lambda: launch_backward.backward(given["dy"], None, states, *inputs)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            line["MiB"][name] = (torch.cuda.max_memory_allocated() - before) >> 20
            line["ms"][name] = round(median(run), 3)
        print(json.dumps(line), flush=True)


def whole_child(indices):
    """Forward + backward of the product operator with the chosen rows, and its memory beyond the inputs."""
    use(VARIANTS[indices[1]])
    tuning.AHEAD[N] = VARIANTS[indices[0]][1]
    for name, size in ROWS.items():
        given = draw(*size)
        leaves = {n: given[n].requires_grad_() for n in NAMES}

        def run():
            y, _ = selective_scan(*(leaves[n] for n in NAMES[:5]), **{n: leaves[n] for n in NAMES[5:]}, dt_softplus=True, backend="triton")
            torch.autograd.grad(y, list(leaves.values()), given["dy"])

        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        mib = (torch.cuda.max_memory_allocated() - before) >> 20
        print(json.dumps({"row": name, "forward + backward ms": round(median(run), 3), "MiB": mib}), flush=True)


def lines_of(arguments, seconds):
    process = subprocess.Popen([sys.executable, os.path.abspath(__file__), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return found, (err.strip().splitlines() or [""])[-1][:200]


def main(budget=100.0, workers=14):
    begin = time.time()
    left = lambda: budget - (time.time() - begin)
    folder = tempfile.mkdtemp()
    data = {}
    for name, size in CHECKS.items():
        given = draw(*size)
        data[name] = (given, exact(given))
    torch.save(data, f"{folder}/exact.pt")
    del data, given
    torch.cuda.empty_cache()
    results = {i: {"variant": str(v)} for i, v in enumerate(VARIANTS)}
    print(f"exact after {time.time() - begin:.0f} s", flush=True)

    def check(indices):
        todo = list(indices)
        while todo and left() > 50:
            found, err = lines_of(["--check", folder, json.dumps(todo)], left() - 45)
            for line in found:
                results[line["index"]].update({k: v for k, v in line.items() if k not in ("index", "begun")})
            begun = [line["index"] for line in found if "begun" in line]
            for i in begun[-1:] or todo[:1]:
                if "errors" not in results[i] and "failed" not in results[i]:
                    results[i]["failed"] = "died: " + err
            todo = [i for i in todo if i not in begun[:-1] + (begun[-1:] or todo[:1])]

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(check, [range(w, len(VARIANTS), workers) for w in range(workers)]))
    print(f"checked after {time.time() - begin:.0f} s", flush=True)
    for v in results.values():
        v["right"] = "errors" in v and all(right(found) for found in v["errors"].values())
    todo = [i for i, v in results.items() if v["right"]]
    while todo and left() > 20:
        found, err = lines_of(["--time", json.dumps(todo), str(begin + budget - 22)], left() - 15)
        for line in found:
            results[line.pop("index")].update(line)
        done = [i for i in todo if "ms" in results[i]]
        if not found:
            print("stopped at", VARIANTS[todo[0]], err)
        todo = [i for i in todo if i not in done] if found else todo[1:]
    print(f"timed after {time.time() - begin:.0f} s; ms and MiB at {', '.join(ROWS)}")
    for i, (kind, b, chunk) in enumerate(VARIANTS):
        v = results[i]
        worst = max(((e if e == e else 9e9, k) for by in v.get("errors", {}).values() for k, e in by.items()), default=(9e9, "-"))
        print(f"{kind:8} tiles {b.tiles} e {b.e} tile {b.tile} warps {b.warps} resident {b.resident} chunk {chunk} | {worst[0]:.1e} {worst[1]}",
              "ok" if v["right"] else "WRONG", "|", *(v.get("ms", {}).get(row, "-") for row in ROWS), "|",
              *(v.get("MiB", {}).get(row, "-") for row in ROWS), v.get("failed", ""))  # fmt: skip
    chosen = []
    for kind in ("forward", "backward"):
        found = [(sum(v["ms"].values()), i) for i, v in results.items() if "ms" in v and VARIANTS[i][0] == kind and VARIANTS[i][2] == 64]
        chosen += [min(found)[1]] if found else []
    wholes = []
    if len(chosen) == 2:
        print("chosen", [VARIANTS[i] for i in chosen])
        wholes, err = lines_of(["--whole", json.dumps(chosen)], max(left(), 15))
        print(*wholes, err if len(wholes) < len(ROWS) else "", sep="\n")
    with open(os.path.join(os.environ.get("OUT", folder), "selective_scan_engine.json"), "w") as file:
        json.dump({"variants": results, "chosen": chosen, "wholes": wholes, "device": torch.cuda.get_device_name()}, file)
    print(f"{torch.cuda.get_device_name()}, {time.time() - begin:.0f} s")


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
    const |= dict(CHUNK=chunk, TILE=b.tile, TILES=b.tiles, ROWS=b.rows, BLOCK_E=b.e)
    const |= dict.fromkeys(("initial_ptr", "entering_ptr", "owner_ptr", "cu_ptr", "dfinal_ptr", "dinitial_ptr"))
    kernel = scan_kernel if kind == "forward" else gradient_kernel
    return compiled(kernel, {n: v for n, v in const.items() if n in kernel.arg_names}, given, b.warps)


if __name__ == "__main__":
    mode = sys.argv[1] if len(sys.argv) > 1 else ""
    if mode == "--check":
        check_child(json.loads(sys.argv[3]), sys.argv[2])
    elif mode == "--time":
        time_child(json.loads(sys.argv[2]), float(sys.argv[3]))
    elif mode == "--whole":
        whole_child(json.loads(sys.argv[2]))
    elif mode == "--interpret":
        sys.exit(interpret(sys.argv[2:]))
    elif mode == "--offline":
        for i, variant in enumerate(VARIANTS):
            if len(sys.argv) < 3 or str(i) in sys.argv[2:]:
                begin = time.time()
                print(i, *variant, offline(variant), f"{time.time() - begin:.0f} s", flush=True)
    else:
        main()

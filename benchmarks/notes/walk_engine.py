"""Linear attention by walks: checks and times block sizes of every walk in one run.

    python benchmarks/notes/walk_engine.py            the whole run (GPU, about 50 s); JSON to $OUT/walk_engine.json
    PYTHONPATH=<triton 3.6> python ... --offline      registers, local memory, shared memory, HGMMA for sm_90, no GPU

B8 T4096 H16 N128 P128, bf16. Walks: `ahead` (y), `dv`, `dq`, `dk`; with an n for the normalised ones. A product of
N = P = 128 in two blocks of 64 columns at chunk 64 costs 112 kFLOP per token and head (scores twice): 59 GFLOP a walk,
0.15 ms at 400 TFLOP/s; four tensors of 134 MB a walk, 0.16 ms at 3.35 TB/s.
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

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path[:0] = [ROOT, os.path.join(ROOT, "specs")]

WALKS = ("ahead", "dv", "dq", "dk", "nahead", "ndv", "ndq", "ndk")
VARIANTS = [
    (64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (64, 128, 8, 2), (64, 128, 8, 1),
    (128, 64, 8, 2), (128, 64, 8, 1), (128, 128, 8, 1), (128, 128, 8, 2), (128, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 3),
    (32, 128, 4, 2), (32, 128, 8, 2), (64, 64, 8, 2),
]  # fmt: skip  # chunk, columns, warps, stages


def draw(batch, T, H, N, P, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, device="cuda", generator=g)
    q, k, v, dy = r(batch, T, H, N), r(batch, T, H, N), r(batch, T, H, P), r(batch, T, H, P)
    return {False: [x.bfloat16() for x in (q, k, v, dy)], True: [x.bfloat16() for x in (q.abs(), k.abs(), v, dy)]}


class Problem:
    """Inputs, plain and positive, and what the walks of the backward need from the forward."""

    def __init__(self, *sizes):
        from zoo.ops.semiseparable.kernels import walk_launch

        self.launch, self.given = walk_launch, draw(*sizes)
        q, k, v, dy = self.given[True]
        y, _, rows = walk_launch.linear_forward(q, k, v, None, None, True, 1e-6, 1.0)
        self.rows = walk_launch.Tokens(rows)
        self.shift = walk_launch.row_products(dy, y)

    def run(self, name, blocks):
        """What one walk fills: [B,T,H,.]."""
        normalised, kind = name.startswith("n"), name.removeprefix("n")
        q, k, v, dy = self.given[normalised]
        rows, shift = (self.rows, self.shift) if normalised else (None, None)
        shifted = ("rows", "keys") if normalised else ("", "")
        walk, blocks = self.launch.walk, self.launch.Blocks(*blocks)
        if kind == "ahead":
            out, made = torch.empty_like(v), self.launch.Tokens(torch.empty_like(self.rows.values.mT).mT)
            walk(q, k, v, out, None, eps=1e-6, normalise=normalised, rows=made if normalised else None, blocks=blocks)
        elif kind == "dv":
            out = torch.empty_like(v)
            walk(k, q, dy, out, None, reverse=True, weights=rows, blocks=blocks)
        elif kind == "dq":
            out = torch.empty_like(q)
            walk(dy, v, k, out, None, rows=rows, shift=shift, shifted=shifted[0], blocks=blocks)
        else:
            out = torch.empty_like(k)
            walk(v, dy, q, out, None, reverse=True, weights=rows, shift=shift, shifted=shifted[1], blocks=blocks)
        return out


SMALL, LARGE = (1, 600, 2, 128, 128), (8, 4096, 16, 128, 128)


def exact(given, normalised):
    """y, dv, dq, dk in float64."""
    from zoo.ops.linear_attention import linear_attention

    q, k, v = (x.double().requires_grad_() for x in given[:3])
    y, _ = linear_attention(q, k, v, normalize=normalised, backend="chunked")
    dq, dk, dv = torch.autograd.grad(y, (q, k, v), given[3].double())
    return {"ahead": y.detach(), "dv": dv, "dq": dq, "dk": dk}


def relative(a, e):
    return float((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt())


def check_child(indices, folder):
    """Compiles and checks variants; prints a line before and after each, since a wrong kernel may end the process."""
    p = Problem(*SMALL)
    expected = torch.load(f"{folder}/exact.pt", map_location="cuda")
    for index, name in indices:
        print(json.dumps({"begun": [index, name]}), flush=True)
        try:
            found = {"error": relative(p.run(name, VARIANTS[index]), expected[name])}
            torch.cuda.synchronize()
        except Exception as error:
            found = {"failed": f"{type(error).__name__} {error}"[-120:]}
            if "CUDA error" in str(error) or "illegal" in str(error):
                raise
        print(json.dumps({"case": [index, name]} | found), flush=True)


def median_ms(fn, repeats=12):
    fn()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for i in range(repeats):
        marks[2 * i].record()
        fn()
        marks[2 * i + 1].record()
    torch.cuda.synchronize()
    return sorted(marks[2 * i].elapsed_time(marks[2 * i + 1]) for i in range(repeats))[repeats // 2]


def time_child(cases, deadline):
    p = Problem(*LARGE)
    for index, name in cases:
        if time.time() > deadline:
            return
        ms = median_ms(lambda: p.run(name, VARIANTS[index]))  # noqa: B023
        print(json.dumps({"case": [index, name], "ms": round(ms, 4)}), flush=True)


def whole_child():
    """The public operator as it is tuned now, forward and both."""
    from zoo.ops.linear_attention import linear_attention

    given = draw(*LARGE)
    for normalised in (False, True):
        q, k, v = (x.detach().requires_grad_() for x in given[normalised][:3])
        dy = given[normalised][3]

        def ahead():
            with torch.no_grad():
                return linear_attention(q, k, v, normalize=normalised, backend="triton")  # noqa: B023

        def both():
            y, _ = linear_attention(q, k, v, normalize=normalised, backend="triton")  # noqa: B023
            return torch.autograd.grad(y, (q, k, v), dy)  # noqa: B023

        print(json.dumps({"normalised": normalised, "forward": round(median_ms(ahead), 4), "both": round(median_ms(both), 4)}), flush=True)


def lines_of(arguments, seconds):
    process = subprocess.Popen([sys.executable, os.path.abspath(__file__), *arguments], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        out, err = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return found, (err.strip().splitlines() or [""])[-1][:150]


def main(budget=48.0, workers=14):
    begin = time.time()
    left = lambda: budget - (time.time() - begin)
    folder = tempfile.mkdtemp()
    given = draw(*SMALL)
    expected = exact(given[False], False) | {"n" + key: value for key, value in exact(given[True], True).items()}
    torch.save(expected, f"{folder}/exact.pt")
    torch.cuda.empty_cache()
    cases = [(i, name) for i in range(len(VARIANTS)) for name in WALKS]  # the likeliest variants first
    results = {case: {} for case in cases}

    def check(todo):
        while todo and left() > 22:
            found, err = lines_of(["--check", folder, json.dumps(todo)], left() - 20)
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
        list(pool.map(check, [cases[w::workers] for w in range(workers)]))
    print(f"checked after {time.time() - begin:.0f} s", flush=True)
    todo = [case for case, found in results.items() if found.get("error", 1.0) < 2e-2]
    while todo and left() > 9:
        found, err = lines_of(["--time", json.dumps(todo), str(begin + budget - 9)], left() - 6)
        for line in found:
            results[tuple(line["case"])]["ms"] = line["ms"]
        if not found or time.time() > begin + budget - 9:
            print("timing stopped:", err)
            break
        todo = todo[todo.index(tuple(found[-1]["case"])) + 1 :]
    print("chunk columns warps stages |", *WALKS)
    for i, variant in enumerate(VARIANTS):
        row = [results[i, name] for name in WALKS]
        print(*variant, "|", *(str(r.get("ms", "-")) + ("" if r.get("error", 1) < 2e-2 else "!") for r in row), "| worst", max((r["error"] for r in row if "error" in r), default="-"),
              next((r["failed"] for r in row if "failed" in r), ""))  # fmt: skip
    best = {name: min(((r["ms"], VARIANTS[i]) for (i, n), r in results.items() if n == name and "ms" in r), default=None) for name in WALKS}
    print("best", json.dumps(best))
    wholes, err = lines_of(["--whole"], max(left(), 12))
    for line in wholes:
        print(json.dumps(line), flush=True)
    if len(wholes) < 2:
        print("wholes stopped:", err)
    with open(f"{os.environ.get('OUT', folder)}/walk_engine.json", "w") as file:
        listed = [{"walk": n, "variant": VARIANTS[i]} | r for (i, n), r in results.items()]
        json.dump({"variants": listed, "best": best, "wholes": wholes, "device": torch.cuda.get_device_name()}, file)
    print(f"{time.time() - begin:.0f} s")


# ----------------------------------------------------------------------------------------------- without a GPU: the compiler

OPTIONS = {
    "ahead": {}, "dv": {"REVERSE": True}, "dq": {}, "dk": {"REVERSE": True},
    "nahead": {"NORMALISE": True}, "ndv": {"REVERSE": True, "HAS_WEIGHT": True},
    "ndq": {"HAS_ROW": True, "SHIFTED": "rows"}, "ndk": {"REVERSE": True, "HAS_WEIGHT": True, "SHIFTED": "keys"},
    "ssd": {"HAS_DECAY": True, "HAS_SKIP": True, "P": 64, "H": 64, "JQ": 64, "JK": 64, "STORE_END": True},
}  # fmt: skip


def compiled(name, variant, N=128, dtype="bf16"):
    """Registers, stack, shared memory and matrix instructions of one walk for sm_90."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from zoo.ops.semiseparable.kernels.walk import walk_kernel

    chunk, columns, warps, stages = variant
    flags = ("REVERSE", "PACKED", "HAS_DECAY", "HAS_SKIP", "NORMALISE", "HAS_ROW", "HAS_WEIGHT", "HAS_START", "HAS_START_VECTOR", "STORE_END")
    const = {flag: False for flag in flags} | dict(SCALED="", SHIFTED="", H=16, JQ=1, JK=1, JV=1, N=N, P=128)
    const |= OPTIONS[name] | dict(CHUNK=chunk, BLOCK_N=triton.next_power_of_2(N), BLOCK_P=columns)
    const["OPERAND"] = {"bf16": tl.bfloat16, "fp16": tl.float16}[dtype]
    used = {"row_ptr": const["NORMALISE"] or const["HAS_ROW"], "weight_ptr": const["HAS_WEIGHT"], "shift_ptr": const["SHIFTED"] != "",
            "s_ptr": const["HAS_DECAY"], "r_ptr": const["HAS_DECAY"], "slot_ptr": False, "skip_ptr": const["HAS_SKIP"], "start_ptr": False,
            "start_vector_ptr": False, "cu_ptr": False, "end_ptr": const["STORE_END"], "end_vector_ptr": False}  # fmt: skip
    const |= {key: None for key, present in used.items() if not present}
    names = walk_kernel.arg_names
    half = ("query_ptr", "key_ptr", "value_ptr", "out_ptr")
    kind = lambda n: f"*{dtype}" if n in half else "*fp32" if n.endswith("_ptr") else "fp32" if n in ("factor", "eps") else "i32"
    signature = {n: "constexpr" if n in const else kind(n) for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in ("query_t", "query_h", "key_t", "key_h", "value_t", "value_h")]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(walk_kernel, signature, {(names.index(n),): v for n, v in const.items()}, attrs)
    begin = time.time()
    k = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, num_stages=stages))
    took = time.time() - begin
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(k.asm["cubin"])
        file.flush()
        usage = subprocess.run([f"{tools}/cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        sass = subprocess.run([f"{tools}/nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    return dict(registers=int(found[1]), stack=int(found[2]), local=sass.count("STL") + sass.count("LDL"), shared_kb=k.metadata.shared // 1024,
                hgmma=sass.count("HGMMA"), hmma=len(re.findall(r"\bHMMA", sass)), seconds=round(took, 1))  # fmt: skip


if __name__ == "__main__":
    mode = sys.argv[1] if len(sys.argv) > 1 else ""
    if mode == "--check":
        check_child([tuple(case) for case in json.loads(sys.argv[3])], sys.argv[2])
    elif mode == "--time":
        time_child([tuple(case) for case in json.loads(sys.argv[2])], float(sys.argv[3]))
    elif mode == "--whole":
        whole_child()
    elif mode == "--offline":
        for name in sys.argv[2].split(",") if len(sys.argv) > 2 else OPTIONS:
            for variant in VARIANTS[: int(sys.argv[3])] if len(sys.argv) > 3 else VARIANTS:
                try:
                    print(name, *variant, "|", compiled(name, variant), flush=True)
                except Exception as error:
                    print(name, *variant, "|", f"{type(error).__name__} {error}"[-160:], flush=True)
    else:
        main()

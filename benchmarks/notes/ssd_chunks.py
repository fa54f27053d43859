"""Checks and times the SSD kernels that work from states at chunk borders, variant by variant, in one run (GPU).

python benchmarks/notes/ssd_chunks.py    prints a line per variant and writes $OUT/ssd_chunks.json
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "specs"), str(ROOT / "plugins")]

import torch  # noqa: E402

ROWS = {"B8 T4096": (8, 4096, 128), "B1 T65536": (1, 65536, 128), "B8 T4096 N64": (8, 4096, 64)}
LIMITS = (0.0, math.inf)


def variants():
    for rows, heads, warps, stages in ((128, 16, 8, 3), (64, 16, 4, 2), (128, 64, 8, 3), (128, 32, 8, 4), (64, 64, 4, 3)):
        yield "VALUES", {"BLOCK_Q": rows, "HEADS": heads, "num_warps": warps, "num_stages": stages}
    for heads, warps, stages in ((16, 8, 3), (32, 8, 4), (64, 8, 3), (8, 8, 3), (16, 8, 2)):
        yield "PAIRS", {"HEADS": heads, "num_warps": warps, "num_stages": stages}
    for heads, warps, stages in ((64, 8, 3), (64, 8, 2), (32, 8, 3), (16, 8, 3)):
        yield "KEYS", {"HEADS": heads, "num_warps": warps, "num_stages": stages}
    for n, p, warps, stages in ((128, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 3)):
        yield "SWEEP", {"BLOCK_N": n, "BLOCK_P": p, "num_warps": warps, "num_stages": stages}
    for rows, heads, warps, stages in ((128, 16, 8, 3), (64, 16, 4, 2), (128, 64, 8, 3)):
        yield "OUTPUTS", {"BLOCK_Q": rows, "HEADS": heads, "num_warps": warps, "num_stages": stages}


def draw(batch, tokens, modes, heads=64, channels=64):
    g = torch.Generator("cuda").manual_seed(0)
    r = lambda *shape: torch.randn(*shape, device="cuda", generator=g)
    bf = torch.bfloat16
    return dict(
        x=r(batch, tokens, heads, channels).to(bf), dt=(r(batch, tokens, heads) - 1).to(bf),
        A=-torch.exp(torch.rand(heads, device="cuda", generator=g) * 2.77), B=r(batch, tokens, 1, modes).to(bf),
        C=r(batch, tokens, 1, modes).to(bf), D=r(heads), bias=r(heads) * 0.5 - 3,
        dy=r(batch, tokens, heads, channels).to(bf),
    )  # fmt: skip


def pieces(v):
    """Calls of each kernel by the name of its settings, and of the whole."""
    from zoo.ops.ssd.kernels import launch, walk
    from zoo.ops.semiseparable.kernels.chunks import chunks_of, decay_sums

    x, dy, B, C, D = (v[name] for name in ("x", "dy", "B", "C", "D"))
    chunks = chunks_of(x, None, launch.CHUNK)
    s, r = decay_sums(chunks, v["dt"], v["A"], v["bias"], True, LIMITS)
    S, R, _, _ = launch.sweep(chunks, x, dy, B, C, s, r, None, None, launch.SWEEP)
    K = launch.pairs(chunks, x, dy, B, C, s, r, True, launch.PAIRS)[0]
    common = (x, v["dt"], v["A"], B, C, D, v["bias"], True, LIMITS, None, None)
    parts = launch.pairs(chunks, x, dy, B, C, s, r, True, launch.PAIRS)
    of_keys = launch.keys(chunks, x, dy, B, C, s, r, S, R, K, launch.KEYS)
    return {
        "WALK": lambda: walk.forward(*common),
        "DECAYS": lambda: launch.decays(
            chunks, v["dt"], v["A"], v["bias"], True, LIMITS, *parts[1:3], of_keys[3], of_keys[2], parts[3], of_keys[4]
        ),
        "SUMS": lambda: decay_sums(chunks, v["dt"], v["A"], v["bias"], True, LIMITS),
        "SWEEP": lambda: launch.sweep(chunks, x, dy, B, C, s, r, None, None, launch.SWEEP),
        "SWEEP ahead": lambda: launch.sweep(chunks, x, None, B, C, s, r, None, None, launch.SWEEP),
        "VALUES": lambda: launch.values(chunks, dy, B, C, s, r, R, D, launch.VALUES),
        "PAIRS": lambda: launch.pairs(chunks, x, dy, B, C, s, r, True, launch.PAIRS),
        "KEYS": lambda: launch.keys(chunks, x, dy, B, C, s, r, S, R, K, launch.KEYS),
        "OUTPUTS": lambda: launch.outputs(chunks, x, B, C, s, r, S, D, launch.OUTPUTS),
        "forward": lambda: launch.forward(*common),
        "backward": lambda: launch.backward(dy, None, *common),
    }


def exact(v):
    import zoo.ops

    names = ("x", "dt", "A", "B", "C", "D", "bias")
    w = {name: v[name].double().requires_grad_() for name in names}
    y, _ = zoo.ops.ssd(
        w["x"], w["dt"], w["A"], w["B"], w["C"], D=w["D"], dt_bias=w["bias"], dt_softplus=True, backend="chunked"
    )
    grads = torch.autograd.grad((y * v["dy"].double()).sum(), [w[name] for name in names])
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def errors(v, truth):
    run = pieces(v)
    got = dict(zip(("x", "dt", "A", "B", "C", "D", "bias"), run["backward"](), strict=False))
    got["y"] = run["forward"]()[0]
    return {n: float((got[n].double() - e).square().mean().sqrt() / e.square().mean().sqrt()) for n, e in truth.items()}


def ms(run):
    from zoo.bench.timing import median, time_samples

    return round(median(time_samples(run, torch.device("cuda"), 0.012)), 4)


def main():
    from zoo.ops.ssd.kernels import launch

    found = list(variants())
    if sys.argv[1:2] == ["--warm"]:
        for place in range(int(sys.argv[2]), len(found), int(sys.argv[3])):
            for modes in (128, 64):
                setattr(launch, found[place][0], found[place][1])
                run = pieces(draw(1, 2048, modes))
                run["backward"](), run["forward"](), run["SWEEP ahead"]()
                torch.cuda.synchronize()
        return
    children = [subprocess.Popen([sys.executable, __file__, "--warm", str(i), "12"]) for i in range(12)]
    for child in children:
        child.wait()
    small = draw(1, 1000, 128)
    truth = exact(small)
    base = {kind: dict(getattr(launch, kind)) for kind, _ in found}
    out = []
    rows = {name: pieces(draw(*sizes)) for name, sizes in ROWS.items()}
    for name, run in rows.items():
        times = {kind: ms(call) for kind, call in run.items()}
        out.append({"row": name, "ms": times})
        print(name, times, flush=True)
    for kind, options in found:
        setattr(launch, kind, options)
        try:
            bad = errors(small, truth)
            times = {name: ms(run[kind]) for name, run in rows.items()}
            out.append({"kind": kind, "options": options, "errors": bad, "ms": times})
            worst = max(bad, key=bad.get)
            print(kind, options, f"{worst} {bad[worst]:.1e}", times, flush=True)
        except Exception as error:
            print(kind, options, str(error)[:150], flush=True)
        setattr(launch, kind, base[kind])
    Path(os.environ.get("OUT", ".")).joinpath("ssd_chunks.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main()

"""Checks and times the SSD kernels: the march along segments, and the backward kernel by kernel, in one run (GPU).

python benchmarks/notes/ssd_chunks.py    prints a line per variant and writes $OUT/ssd_chunks.json

Times are of CUDA graphs, with the cache flushed in between: several of these calls take longer on the host.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "specs"), str(ROOT / "plugins")]

import torch  # noqa: E402

ROWS = {
    "B8 T4096": (8, 4096, 128), "B2 T16384": (2, 16384, 128), "B1 T65536": (1, 65536, 128),
    "B8 T4096 N256": (8, 4096, 256), "B2 T16384 N64": (2, 16384, 64), "B1 T65536 N64": (1, 65536, 64),
}  # fmt: skip
OTHERS = {
    "B8 T4096 N64": (8, 4096, 64), "B8 T4096 H32 P128": (8, 4096, 128, 32, 128), "B5 T8192": (5, 8192, 128),
    "B1 T1000000 H16": (1, 1000000, 128, 16), "B1 T65536 N16": (1, 65536, 16),
}  # fmt: skip
SMALLS = [(2, 1024, 128), (1, 1000, 128), (1, 1000, 256), (2, 1024, 64)]  # batch, tokens and modes of what is checked
SLOW = -9.0  # added to the bias of time steps: nothing decays, and the pieces of all segments are read
LIMITS = (0.0, math.inf)
WORST = 0.01  # relative RMS error of any result; bfloat16 rounds to 0.002
PATIENCE = 40.0  # seconds for all processes that compile side by side
NAMES = ("x", "dt", "A", "B", "C", "D", "bias")


def variants():
    """Kind and settings, after the defaults: the most promising first. SEGMENTS: a number for every row."""
    piece = {"tokens": 2048, "tile": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3}
    yield "EVEN", {"even": False}
    yield "SEGMENTS", {"segments": 2}
    yield "SEGMENTS", {"segments": 4}
    yield "SEGMENTS", {"segments": 8}
    yield "PIECE", piece | {"tokens": 1024}
    yield "PIECE", piece | {"BLOCK_N": 64, "num_stages": 4}
    yield "PAIRS", {"BLOCK_I": 64, "BLOCK_J": 64, "HEADS": 32, "num_warps": 4, "num_stages": 4}


def draw(batch, tokens, modes, heads=64, channels=64):
    g = torch.Generator("cuda").manual_seed(0)
    r = lambda *shape: torch.randn(*shape, device="cuda", generator=g)
    bf = torch.bfloat16
    return {
        "x": r(batch, tokens, heads, channels).to(bf), "dt": (r(batch, tokens, heads) - 1).to(bf),
        "A": -torch.exp(torch.rand(heads, device="cuda", generator=g) * 2.77), "B": r(batch, tokens, 1, modes).to(bf),
        "C": r(batch, tokens, 1, modes).to(bf), "D": r(heads), "bias": r(heads) * 0.5 - 3,
        "dy": r(batch, tokens, heads, channels).to(bf),
    }  # fmt: skip


def whole(v):
    """Calls of the forward, by the walk, by the march in whole sequences and as the operator does; of the backward."""
    from zoo.ops.ssd.kernels import segments, walk, wide

    common = (v["x"], v["dt"], v["A"], v["B"], v["C"], v["D"], v["bias"], True, LIMITS, None, None)
    return {
        "WALK": lambda: walk.walked(*common),
        "MARCH": lambda: walk.forward(*common),
        "SEGMENTS": lambda: segments.forward(*common),
        "backward": lambda: wide.backward(v["dy"], None, *common),
    }


def pieces(v):
    """Calls of each kernel by the name of its settings, and of the whole. States and pairs are zeros: times only."""
    from zoo.ops.semiseparable.kernels.chunks import chunks_of, decay_sums
    from zoo.ops.ssd.kernels import launch, march_launch, segments

    x, dy, B, C, D = (v[name] for name in ("x", "dy", "B", "C", "D"))
    heads, channels, modes = *x.shape[2:], B.shape[3]
    chunks = chunks_of(x, None, launch.CHUNK)
    s, r = decay_sums(chunks, v["dt"], v["A"], v["bias"], True, LIMITS, finite=True)
    S, R = (torch.zeros(chunks.count, heads, modes, channels, dtype=x.dtype, device=x.device) for _ in range(2))
    K = torch.zeros(chunks.count, heads // launch.PAIRS["HEADS"], launch.CHUNK, launch.CHUNK, device=x.device)
    row, col = (
        torch.zeros(launch.CHUNK // launch.PAIRS[block], heads, chunks.count, launch.CHUNK, device=x.device)
        for block in ("BLOCK_J", "BLOCK_I")
    )
    planes = modes // min(launch.KEYS["BLOCK_N"], modes)
    read, flow = (torch.zeros(planes, *kind, device=x.device) for kind in (row.shape[1:], row.shape[1:3]))
    walks = chunks.sequences * heads
    wide = modes > 128
    short = chunks_of(x, None, march_launch.blocks_for(modes).chunk)
    fine = decay_sums(short, v["dt"], v["A"], v["bias"], True, LIMITS)
    count = max(2, segments.segments_for(walks, x.shape[1]))
    return {
        "PIECE": lambda: segments.states(short, x, B, *fine, None, None, count, segments.PIECE),
        "DECAYS": lambda: launch.decays(
            chunks, v["dt"], v["A"], v["bias"], True, LIMITS, row, col, read, read, row[0], flow
        ),
        "SUMS": lambda: decay_sums(chunks, v["dt"], v["A"], v["bias"], True, LIMITS, finite=True),
        "SWEEP": lambda: launch.sweep(chunks, x, dy, B, C, s, r, None, None, launch.sweep_blocks(2 * walks)),
        "VALUES": lambda: launch.values(chunks, dy, B, C, s, r, R, D, launch.WIDE if wide else launch.VALUES),
        "PAIRS": lambda: launch.pairs(chunks, x, dy, B, C, s, r, True, launch.PAIRS),
        "KEYS": lambda: launch.keys(chunks, x, dy, B, C, s, r, S, R, K, launch.KEYS),
        **whole(v),
    }


def exact(v):
    import zoo.ops

    w = {name: v[name].double().requires_grad_() for name in NAMES}
    y, _ = zoo.ops.ssd(
        w["x"], w["dt"], w["A"], w["B"], w["C"], D=w["D"], dt_bias=w["bias"], dt_softplus=True, backend="chunked"
    )
    grads = torch.autograd.grad((y * v["dy"].double()).sum(), [w[name] for name in NAMES])
    return {"y": y.detach(), **dict(zip(NAMES, grads, strict=True))}


def verdict(v, truth, only=""):
    """The largest relative RMS error of the outputs and all gradients, in words; and whether two runs are the same.

    only: how the names of those that count begin.
    """
    from zoo.ops.ssd.kernels import segments

    run, shortest = whole(v), segments.SHORTEST
    segments.SHORTEST = 64  # so that few tokens are cut too
    got, again = (
        dict(zip(NAMES, run["backward"](), strict=False))
        | {f"y {way}": run[way]()[0] for way in ("WALK", "MARCH", "SEGMENTS")}
        for _ in range(2)
    )
    segments.SHORTEST = shortest
    found = {}
    for n, g in got.items():
        e = truth[n[:1] if n.startswith("y") else n]
        found[n] = float((g.double() - e).square().mean().sqrt() / e.square().mean().sqrt())
    worst = max([n for n in found if n.startswith(only)], key=lambda n: math.inf if math.isnan(found[n]) else found[n])
    same = all(torch.equal(got[n], again[n]) for n in got)
    words = "right" if found[worst] < WORST else "WRONG"
    return f"{words} ({worst} {found[worst]:.1e}){'' if same else ' UNSTEADY'}", found


def ms(run, seconds=0.012):
    """Median of the replays of a CUDA graph of one call."""
    from zoo.bench.timing import median, time_samples

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    found = median(time_samples(graph.replay, torch.device("cuda"), seconds))
    del kept, graph
    return round(found, 4)


def use(kind, options):
    """Take these settings; returns what takes the old ones back."""
    from zoo.ops.ssd.kernels import launch, march_launch, segments

    if kind == "SEGMENTS":
        home, name, new = segments, "segments_for", lambda walks, tokens: options["segments"]
    elif kind == "EVEN":
        home, name, new = march_launch, "whole", lambda chunks: options["even"]
    else:
        home, name, new = (segments if kind == "PIECE" else launch), kind, options
    old = getattr(home, name)
    setattr(home, name, new)
    return lambda: setattr(home, name, old)


def asked(kind, run):
    """Names of the calls that a kind of settings changes."""
    names = {"PIECE": ("PIECE", "SEGMENTS"), "EVEN": ("MARCH", "SEGMENTS")}
    return [name for name in names.get(kind, (kind,)) if name in run]


def compile_part(place):
    """What child `place` compiles: one row with the defaults, shortened, or one variant."""
    from zoo.ops.ssd.kernels import segments

    segments.SHORTEST = 64
    if place < len(ROWS):
        batch, _, modes = [*ROWS.values()][place]
        calls = list(pieces(draw(batch, 256, modes)).values())
    else:
        kind, options = list(variants())[place - len(ROWS)]
        use(kind, options)
        run = [pieces(draw(1, 2048, modes)) for modes in (64, 128, 256)]
        calls = [part[name] for part in run for name in asked(kind, part)]
    for call in calls:
        call()
    torch.cuda.synchronize()


def warm():
    begun, count = time.monotonic(), len(ROWS) + len(list(variants()))
    children = [subprocess.Popen([sys.executable, __file__, "--warm", str(place)]) for place in range(count)]
    for place, child in enumerate(children):
        try:
            child.wait(max(1.0, PATIENCE - (time.monotonic() - begun)))
        except subprocess.TimeoutExpired:
            child.kill()
            print("not compiled in time:", place, flush=True)
    print(f"compiled in {time.monotonic() - begun:.0f} s", flush=True)


def main():
    if sys.argv[1:2] == ["--warm"]:
        return compile_part(int(sys.argv[2]))
    warm()
    smalls = [draw(*sizes) for sizes in SMALLS]
    slow = {**smalls[0], "bias": smalls[0]["bias"] + SLOW}
    truths = [exact(small) for small in smalls]
    out = []
    for sizes, small, truth in zip(SMALLS, smalls, truths, strict=True):
        print("defaults B, T, N", sizes, verdict(small, truth)[0], flush=True)
    print("slow", verdict(slow, exact(slow), "y")[0], flush=True)
    rows = {name: pieces(draw(*sizes)) for name, sizes in ROWS.items()}
    for name, run in rows.items():
        times = {kind: ms(call) for kind, call in run.items()}
        out.append({"row": name, "ms": times})
        print(name, times, flush=True)
    for name in ("B2 T16384", "B1 T65536", "B1 T65536 N64"):
        v = draw(*ROWS[name])
        run = whole(v | {"bias": v["bias"] + SLOW})
        out.append({"row": name + " slow", "ms": {"SEGMENTS": ms(run["SEGMENTS"])}})
        print(out[-1], flush=True)
    for kind, options in variants():
        back = use(kind, options)
        try:
            words, bad = verdict(smalls[0], truths[0])
            times = {name: [ms(run[part]) for part in asked(kind, run)] for name, run in rows.items()}
            out.append({"kind": kind, "options": options, "errors": bad, "ms": times})
            print(kind, options, words, times, flush=True)
        except Exception as error:
            print(kind, options, str(error)[:150], flush=True)
        back()
    del rows
    for name, sizes in OTHERS.items():
        run = whole(draw(*sizes))
        times = {kind: ms(call) for kind, call in run.items() if kind != "WALK" or sizes[1] < 100000}
        out.append({"row": name, "ms": times})
        print(name, times, flush=True)
    Path(os.environ.get("OUT", ".")).joinpath("ssd_chunks.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main()

"""Checks and times the SSD kernels that work from states at chunk borders, variant by variant, in one run (GPU).

python benchmarks/notes/ssd_chunks.py    prints a line per variant and writes $OUT/ssd_chunks.json
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

ROWS = {"B8 T4096": (8, 4096, 128), "B1 T65536": (1, 65536, 128), "B8 T4096 N64": (8, 4096, 64)}
WIDE = {"B8 T4096 N256": (8, 4096, 256, 64, 64), "B8 T4096 H32 P128": (8, 4096, 128, 32, 128)}
LIMITS = (0.0, math.inf)
WORST = 0.01  # relative RMS error of any result; bfloat16 rounds to 0.002
PATIENCE = 40.0  # seconds for all processes that compile side by side
NAMES = ("x", "dt", "A", "B", "C", "D", "bias")


def variants():
    """Kind and settings, after the defaults: the most promising first."""
    pairs = {"BLOCK_I": 64, "BLOCK_J": 64, "HEADS": 64, "num_warps": 4, "num_stages": 3}
    yield "PAIRS", pairs | {"num_warps": 8}
    yield "PAIRS", pairs | {"BLOCK_J": 32}
    yield "PAIRS", pairs | {"num_stages": 4}
    yield "PAIRS", pairs | {"HEADS": 32}
    for n, p, warps, stages in ((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 4), (64, 32, 4, 2)):
        yield "SWEEP", {"BLOCK_N": n, "BLOCK_P": p, "num_warps": warps, "num_stages": stages}
    yield "KEYS", {"HEADS": 64, "num_warps": 8, "num_stages": 4}
    yield "VALUES", {"BLOCK_Q": 128, "HEADS": 64, "num_warps": 8, "num_stages": 4}


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
    """Calls of the forward and the backward."""
    from zoo.ops.ssd.kernels import walk, wide

    common = (v["x"], v["dt"], v["A"], v["B"], v["C"], v["D"], v["bias"], True, LIMITS, None, None)
    return {
        "WALK": lambda: walk.forward(*common),
        "forward": lambda: wide.forward(*common),
        "backward": lambda: wide.backward(v["dy"], None, *common),
    }


def pieces(v):
    """Calls of each kernel by the name of its settings, and of the whole. States and pairs are zeros: times only."""
    from zoo.ops.semiseparable.kernels.chunks import chunks_of, decay_sums
    from zoo.ops.ssd.kernels import launch

    x, dy, B, C, D = (v[name] for name in ("x", "dy", "B", "C", "D"))
    heads, channels, modes = *x.shape[2:], B.shape[3]
    chunks = chunks_of(x, None, launch.CHUNK)
    s, r = decay_sums(chunks, v["dt"], v["A"], v["bias"], True, LIMITS, finite=True)
    S, R = (torch.zeros(chunks.count, heads, modes, channels, dtype=x.dtype, device=x.device) for _ in range(2))
    share = launch.PAIRS["HEADS"]
    K = torch.zeros(chunks.count, heads // share, launch.CHUNK, launch.CHUNK, device=x.device)
    row, col = (
        torch.zeros(launch.CHUNK // launch.PAIRS[block], heads, chunks.count, launch.CHUNK, device=x.device)
        for block in ("BLOCK_J", "BLOCK_I")
    )
    flow = torch.zeros(heads, chunks.count, device=x.device)
    walks = chunks.sequences * heads
    return {
        "DECAYS": lambda: launch.decays(
            chunks, v["dt"], v["A"], v["bias"], True, LIMITS, row, col, col[0], row[0], row[0], flow
        ),
        "SUMS": lambda: decay_sums(chunks, v["dt"], v["A"], v["bias"], True, LIMITS, finite=True),
        "SWEEP": lambda: launch.sweep(chunks, x, dy, B, C, s, r, None, None, launch.sweep_blocks(2 * walks)),
        "SWEEP ahead": lambda: launch.sweep(chunks, x, None, B, C, s, r, None, None, launch.sweep_blocks(walks)),
        "VALUES": lambda: launch.values(chunks, dy, B, C, s, r, R, D, launch.VALUES),
        "PAIRS": lambda: launch.pairs(chunks, x, dy, B, C, s, r, True, launch.PAIRS),
        "KEYS": lambda: launch.keys(chunks, x, dy, B, C, s, r, S, R, K, launch.KEYS),
        "OUTPUTS": lambda: launch.outputs(chunks, x, B, C, s, r, S, D, launch.OUTPUTS),
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


def verdict(v, truth):
    """The largest relative RMS error of the outputs and all gradients, in words."""
    run = whole(v)
    got = dict(zip(NAMES, run["backward"](), strict=False)) | {"y": run["forward"]()[0]}
    found = {
        n: float((got[n].double() - e).square().mean().sqrt() / e.square().mean().sqrt()) for n, e in truth.items()
    }
    worst = max(found, key=lambda n: math.inf if math.isnan(found[n]) else found[n])
    return f"{'right' if found[worst] < WORST else 'WRONG'} ({worst} {found[worst]:.1e})", found


def ms(run):
    from zoo.bench.timing import median, time_samples

    return round(median(time_samples(run, torch.device("cuda"), 0.012)), 4)


def use(kind, options):
    from zoo.ops.ssd.kernels import launch

    setattr(launch, kind, (options,) if kind == "SWEEP" else options)


def compile_part(place):
    """What child `place` compiles: one row with the defaults, shortened, or one variant."""
    if place < len(ROWS):
        batch, _, modes = [*ROWS.values()][place]
        calls = list(pieces(draw(batch, 256, modes)).values())
    else:
        kind, options = list(variants())[place - len(ROWS)]
        use(kind, options)
        calls = []
        for modes in (128, 64):
            run = pieces(draw(1, 2048, modes))
            calls += [run[kind], run["SWEEP ahead"]] if kind == "SWEEP" else [run[kind]]
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
    from zoo.ops.ssd.kernels import launch

    if sys.argv[1:2] == ["--warm"]:
        return compile_part(int(sys.argv[2]))
    warm()
    small = draw(1, 1000, 128)
    truth = exact(small)
    out = []
    print("defaults", verdict(small, truth)[0], flush=True)
    rows = {name: pieces(draw(*sizes)) for name, sizes in ROWS.items()}
    for name, run in rows.items():
        times = {kind: ms(call) for kind, call in run.items()}
        out.append({"row": name, "ms": times})
        print(name, times, flush=True)
    for kind, options in variants():
        base = getattr(launch, kind)
        use(kind, options)
        try:
            words, bad = verdict(small, truth)
            asked = (kind, "SWEEP ahead") if kind == "SWEEP" else (kind,)
            times = {name: [ms(run[part]) for part in asked] for name, run in rows.items()}
            out.append({"kind": kind, "options": options, "errors": bad, "ms": times})
            print(kind, options, words, times, flush=True)
        except Exception as error:
            print(kind, options, str(error)[:150], flush=True)
        setattr(launch, kind, base)
    del rows
    for name, sizes in WIDE.items():
        little = draw(1, 500, *sizes[2:])
        words, bad = verdict(little, exact(little))
        times = {kind: ms(call) for kind, call in whole(draw(*sizes)).items()}
        out.append({"row": name, "errors": bad, "ms": times})
        print(name, words, times, flush=True)
    Path(os.environ.get("OUT", ".")).joinpath("ssd_chunks.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main()

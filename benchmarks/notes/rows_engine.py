"""Checks and times the row kernels, short convolution and gated RMS norm, variant by variant, in one run (GPU).

python benchmarks/notes/rows_engine.py    prints a line per variant and writes $OUT/rows.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "specs"), str(ROOT / "plugins")]

import torch  # noqa: E402

CHILDREN = 12


def variants():
    """(kind, settings): BLOCK_D, SPAN, UNROLL, num_warps of the convolution; PROGRAMS, WARPS of the norm."""
    walks = {
        "FORWARD": [(256, 64, 8, 2), (256, 64, 4, 1), (256, 128, 8, 2), (128, 64, 8, 1), (256, 32, 8, 2),
                    (256, 64, 16, 2), (512, 64, 8, 4)],
        "BACKWARD": [(256, 256, 4, 2), (256, 128, 4, 2), (128, 256, 4, 1), (256, 256, 2, 2), (256, 256, 8, 2),
                     (256, 256, 2, 1), (512, 128, 4, 4)],
    }  # fmt: skip
    for kind, rows in walks.items():
        for channels, span, unroll, warps in rows:
            yield kind, {"BLOCK_D": channels, "SPAN": span, "UNROLL": unroll, "num_warps": warps}
    for programs, warps in ((528, 8), (264, 8), (396, 8), (1024, 8), (264, 16), (528, 4), (2048, 8)):
        yield "NORM", {"PROGRAMS": programs, "WARPS": warps}


def draw(batch, tokens, channels, rows, width):
    g = torch.Generator("cuda").manual_seed(0)
    r = lambda *shape: torch.randn(*shape, device="cuda", generator=g).bfloat16()
    conv = dict(x=r(batch, tokens, channels), weight=r(channels, 4), bias=r(channels), dy=r(batch, tokens, channels))
    norm = dict(x=r(rows, width), z=r(rows, width), weight=r(width), dy=r(rows, width))
    return conv, norm


def calls(conv, norm):
    from zoo.ops.norm.kernels.backward import norm_backward
    from zoo.ops.norm.kernels.forward import norm_forward
    from zoo.ops.short_convolution.kernels.backward import convolution_backward
    from zoo.ops.short_convolution.kernels.forward import convolution_forward

    x, weight, bias, dy = conv["x"], conv["weight"], conv["bias"], conv["dy"]
    given = (norm["x"], norm["z"], norm["weight"])
    dfinal = x.new_zeros(x.shape[0], x.shape[2], 3)
    return {
        "FORWARD": lambda: convolution_forward(x, weight, bias, None, None, True)[:1],
        "BACKWARD": lambda: convolution_backward(dy, dfinal, x, weight, bias, None, None, True)[:3],
        "NORM": lambda: norm_backward(norm["dy"], *given, 1e-5, given[0].shape[1], False),
        "NORM forward": lambda: [norm_forward(*given, 1e-5, given[0].shape[1], False)],
    }


def exact(conv, norm):
    """The definitions in float64: results of each call."""
    from zoo.ops import gated_rms_norm, short_convolution

    c, n = ({k: t.double() for k, t in v.items()} for v in (conv, norm))
    leaves = [c[k].requires_grad_() for k in ("x", "weight", "bias")]
    y = short_convolution(*leaves, activation="silu", backend="reference")[0]
    found = {"FORWARD": [y.detach()], "BACKWARD": torch.autograd.grad(y, leaves, c["dy"])}
    leaves = [n[k].requires_grad_() for k in ("x", "z", "weight")]
    y = gated_rms_norm(*leaves, eps=1e-5, backend="reference")
    return found | {"NORM forward": [y.detach()], "NORM": torch.autograd.grad(y, leaves, n["dy"])}


def error(got, truth):
    pairs = list(zip(got, truth, strict=True))
    return max(float((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt()) for a, e in pairs)


def ms(run):
    from zoo.bench.timing import median, time_samples

    return round(median(time_samples(run, torch.device("cuda"), 0.012)), 4)


def settle(kind, options):
    from zoo.ops.norm.kernels import backward
    from zoo.ops.short_convolution.kernels import walk

    if kind == "NORM":
        backward.PROGRAMS, backward.WARPS = options["PROGRAMS"], options["WARPS"]
    else:
        setattr(walk, kind, options)


def main():
    found = list(variants())
    if sys.argv[1:2] == ["--warm"]:
        run = calls(*draw(1, 512, 4352, 64, 4096))
        for place in range(int(sys.argv[2]), len(found), CHILDREN):
            settle(*found[place])
            run[found[place][0]]()
        run["NORM forward"]()
        torch.cuda.synchronize()
        return
    children = [subprocess.Popen([sys.executable, __file__, "--warm", str(i)]) for i in range(CHILDREN)]
    for child in children:
        child.wait()
    small = draw(2, 300, 4352, 1100, 4096)
    truth, check = exact(*small), calls(*small)
    run = calls(*draw(8, 4096, 4352, 32768, 4096))
    print("NORM forward", f"{error(check['NORM forward'](), truth['NORM forward']):.1e}", ms(run["NORM forward"]))
    out = []
    for kind, options in found:
        settle(kind, options)
        try:
            bad, time = error(check[kind](), truth[kind]), ms(run[kind])
            out.append({"kind": kind, "options": options, "error": bad, "ms": time})
            print(kind, options, f"error {bad:.1e}", time, flush=True)
        except Exception as problem:
            print(kind, options, str(problem)[:150], flush=True)
    Path(os.environ.get("OUT", ".")).joinpath("rows.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main()

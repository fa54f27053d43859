"""Checks and times the row kernels, short convolution and gated RMS norm, variant by variant, in one run (GPU).

python benchmarks/notes/rows_engine.py            of many taps (H3's 64): LOOPED kernels, then BANDED ones
python benchmarks/notes/rows_engine.py few        of 4 taps, and the norm
Prints a line per variant and writes $OUT/rows.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "specs"), str(ROOT / "plugins")]

import torch  # noqa: E402

CHILDREN = 12
PATIENCE = 60  # seconds that children get to compile


def many_taps():
    """(kind, settings) for 64 taps. Longest span, stages, channels of a warp, programs at a time, dtype of the taps."""
    yield from (("LOOPED forward", {}), ("LOOPED backward", {}))
    usual = {"forward": dict(span=512, stages=4), "tokens": dict(span=512, stages=4), "taps": dict(span=512, stages=2)}
    for kernel, settings in usual.items():
        yield f"BANDED {kernel}", settings
    yield from (("GATE PyTorch", {}), ("GATE kernels", {}))
    yield "BANDED forward", usual["forward"] | dict(span=256)
    yield "BANDED forward", usual["forward"] | dict(taps="bfloat16")
    yield "BANDED forward", usual["forward"] | dict(stages=6)
    yield "BANDED forward", usual["forward"] | dict(held=1)
    yield "BANDED taps", usual["taps"] | dict(stages=3)
    yield "BANDED taps", usual["taps"] | dict(span=256)
    yield "BANDED taps", usual["taps"] | dict(programs=66)
    yield "BANDED forward", usual["forward"] | dict(span=1024)
    yield "BANDED forward", usual["forward"] | dict(span=128)


def few_taps():
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


def draw_many(batch, tokens):
    """As in H3: keys are a third of a projection, taps float32."""
    g = torch.Generator("cuda").manual_seed(0)
    r = lambda *shape: torch.randn(*shape, device="cuda", generator=g)
    x = r(batch, tokens, 3 * 2048).bfloat16().chunk(3, dim=-1)[1]
    return x, r(2048, 64) / 8, r(batch, tokens, 2048).bfloat16()


def calls_many(x, weight, dy):
    from zoo.ops.short_convolution.kernels import banded_launch as banded
    from zoo.ops.lti_attention.kernels import gates
    from zoo.ops.short_convolution.kernels.looped import looped_backward, looped_forward

    taps = {"float32": weight, "bfloat16": weight.bfloat16()}
    spans = lambda: banded.spans_in(x, None)
    return {
        "LOOPED forward": lambda dtype: looped_forward(x, taps[dtype], None, None, None)[:1],
        "LOOPED backward": lambda dtype: looped_backward(dy, None, x, taps[dtype], None, None, None)[:2],
        "BANDED forward": lambda dtype: [banded.convolve(x, taps[dtype], None, None, spans(), reverse=False)],
        "BANDED tokens": lambda dtype: [banded.convolve(dy, taps[dtype], None, None, spans(), reverse=True)],
        "BANDED taps": lambda dtype: [banded.tap_gradient(dy, x, taps[dtype], None, spans())],
        "GATE PyTorch": lambda dtype: [x * dy, dy * x, dy * dy],  # a product and both gradients, one factor a slice
        "GATE kernels": lambda dtype: [gates.product(x, dy), *gates.product_gradients(dy, x, dy)][:3],
    }


def exact_many(x, weight, dy):
    from zoo.ops import short_convolution

    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    y = short_convolution(*leaves, backend="reference")[0]
    dx, dweight = torch.autograd.grad(y, leaves, dy.double())
    y = y.detach()
    found = {"BANDED forward": [y], "BANDED tokens": [dx], "BANDED taps": [dweight]}
    products = [x.double() * dy.double(), dy.double() * x.double(), dy.double() * dy.double()]
    found |= {"GATE PyTorch": products, "GATE kernels": [products[0], products[2], products[1]]}
    return found | {"LOOPED forward": [y], "LOOPED backward": [dx, dweight]}


def settle_many(kind, settings):
    from zoo.ops.short_convolution.kernels import banded_launch as banded

    if kind.startswith("BANDED"):
        size = banded.Size(held=settings.get("held", 2), stages=settings["stages"])
        banded.SIZES[kind.split()[1]] = size
        banded.SPANS = (settings["span"], settings["span"])
        banded.PROGRAMS = settings.get("programs", 132)
    return settings.get("taps", "float32")


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


def few():
    """What `main` needs: variants, a function that settles one and gives its call, inputs to compile with, to check
    with and to time with, and what is exact."""
    make = lambda inputs: {kind: (lambda _, run=run: run()) for kind, run in calls(*inputs).items()}
    inputs = draw(1, 512, 4352, 64, 4096), draw(2, 300, 4352, 1100, 4096), draw(8, 4096, 4352, 32768, 4096)
    return [("NORM forward", {}), *few_taps()], settle_few, make, inputs, lambda given: exact(*given)


def settle_few(kind, options):
    if options:
        settle(kind, options)


def many():
    inputs = draw_many(1, 512), draw_many(2, 300), draw_many(8, 4096)
    return list(many_taps()), settle_many, lambda given: calls_many(*given), inputs, lambda given: exact_many(*given)


def main():
    words = sys.argv[1:]
    variants, settle_one, make, (tiny, small, large), truth_of = few() if "few" in words else many()
    if "--warm" in words:
        run = make(tiny)
        for place in range(int(words[words.index("--warm") + 1]), len(variants), CHILDREN):
            kind, options = variants[place]
            run[kind](settle_one(kind, options))
        torch.cuda.synchronize()
        return
    began = time.perf_counter()
    children = [subprocess.Popen([sys.executable, __file__, *words, "--warm", str(i)]) for i in range(CHILDREN)]
    for child in children:
        try:
            child.wait(max(0.1, began + PATIENCE - time.perf_counter()))
        except subprocess.TimeoutExpired:
            child.kill()
    print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
    truth, check, run, out = truth_of(small), make(small), make(large), []
    for kind, options in variants:
        try:
            chosen = settle_one(kind, options)
            bad, spent = error(check[kind](chosen), truth[kind]), ms(partial(run[kind], chosen))
            out.append({"kind": kind, "options": options, "error": bad, "ms": spent})
            print(kind, options, f"error {bad:.1e}", spent, flush=True)
        except Exception as problem:
            print(kind, options, str(problem)[:150], flush=True)
    Path(os.environ.get("OUT", ".")).joinpath("rows.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main()

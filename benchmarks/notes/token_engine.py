"""Checks and times the token MLP and Linformer attention, and what they are made of, against plain PyTorch (GPU).

python benchmarks/notes/token_engine.py    prints a line per variant and writes $OUT/token.json
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "specs"), str(ROOT / "plugins")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

D, TOKENS, HIDDEN, HEADS, RANK = 2048, 32768, 1024, 32, 256
LIMIT, BEGUN, CHILDREN = 46.0, time.perf_counter(), 9
ROWS: list[dict] = []


def tell(**row):
    ROWS.append(row)
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)


def r(*shape):
    return torch.randn(*shape, device="cuda").bfloat16()


def ms(run, count=12):
    """Median milliseconds of events around calls, the cache flushed in between, the host running ahead."""
    for _ in range(3):
        run()
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    marks = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(count)]
    for a, b in marks:
        flush.zero_()
        flush.zero_()
        a.record()
        run()
        b.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in marks)


def host_us(run, count=20):
    """Microseconds that the host takes to send a call off."""
    torch.cuda.synchronize()
    spent = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return statistics.median(spent) * 1e6


def peak(run):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def draw_mlp(batch, tokens, d=D, hidden=HIDDEN):
    return [
        r(batch, tokens, d),
        r(hidden, tokens) * tokens**-0.5,
        r(hidden),
        r(tokens, hidden) * hidden**-0.5,
        r(tokens),
    ]


def draw_linformer(batch, tokens, heads=HEADS, rank=RANK, width=64):
    q, k, v = r(batch, tokens, 3 * heads, width).split(heads, 2)  # as an input projection gives them
    E, G = ((torch.randn(tokens, rank, device="cuda") * tokens**-0.5).bfloat16().mT for _ in range(2))
    return [q, k, v, E, G]


def operators():
    from zoo.ops.linformer_attention import linformer_attention
    from zoo.ops.token_mlp import token_mlp

    return {"token_mlp": (token_mlp, draw_mlp), "linformer": (linformer_attention, draw_linformer)}


def both(op, given, cotangent, backend):
    leaves = [t.detach().requires_grad_() for t in given]
    y = op(*leaves, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


def check():
    """Relative RMS error of results and gradients against float64, at a smaller size."""
    for name, (op, draw) in operators().items():
        given = draw(2, 1024, 512, 256) if name == "token_mlp" else draw(2, 1024, 4)
        cotangent = r(*given[0].shape)
        exact = both(op, [t.double() for t in given], cotangent.double(), "reference")
        for backend in ("chunked", "triton"):
            found = both(op, given, cotangent, backend)
            errors = [float((a.double() - e).norm() / e.norm()) for a, e in zip(found, exact, strict=True)]
            tell(check=name, backend=backend, **{f"e{i}": e for i, e in enumerate(errors)})


def whole(tokens):
    for name, (op, draw) in operators().items():
        given = draw(TOKENS // tokens, tokens)
        cotangent = r(*given[0].shape)
        for backend in ("chunked", "triton"):

            def forward(backend=backend):
                with torch.no_grad():
                    return op(*given, backend=backend)

            def train(backend=backend):
                return both(op, given, cotangent, backend)

            tell(
                op=name, T=tokens, backend=backend, forward=ms(forward), train=ms(train), host_fwd_us=host_us(forward),
                host_train_us=host_us(train), fwd_MiB=peak(forward), train_MiB=peak(train),
            )  # fmt: skip


def profile():
    """Kernel by kernel, one training call of each."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    for name, (op, draw) in operators().items():
        given = draw(8, 4096)
        cotangent = r(*given[0].shape)
        for backend in ("chunked", "triton"):
            with watch(activities=[ProfilerActivity.CUDA]) as seen:
                for _ in range(3):
                    both(op, given, cotangent, backend)
                torch.cuda.synchronize()
            for event in sorted(seen.key_averages(), key=lambda e: -e.device_time_total):
                if event.device_time_total > 5:
                    us, calls = event.device_time_total / 3, event.count / 3
                    tell(kernels=name, backend=backend, us=us, calls=calls, name=event.key[:110])


def mlp_parts():
    x, w1, b1, w2, b2 = draw_mlp(8, 4096)
    from zoo.ops.token_mlp.kernels.activation import bias_gelu, bias_gelu_backward

    dy, before = r(*x.shape), r(8, HIDDEN, D)
    wide1, wide2 = w1.expand(8, -1, -1), w2.expand(8, -1, -1)
    hidden, more = torch.empty_like(before), r(8, HIDDEN + 8, D)
    bias_gelu(before, b1, hidden, True)
    wider = F.pad(w2, (0, 8))
    y = torch.empty_like(x)
    ones = x.new_ones(8, D, 1)
    parts = {
        "w1 x bmm": lambda: torch.bmm(wide1, x),
        "w1 x baddbmm": lambda: torch.baddbmm(b1[:, None], wide1, x),
        "w2 h bmm": lambda: torch.bmm(wide2, hidden),
        "w2 h baddbmm": lambda: torch.baddbmm(b2[:, None], wide2, hidden),
        "w2 h bmm, += b2": lambda: torch.bmm(wide2, hidden).add_(b2[:, None]),
        "w2 h bmm, bias as a column": lambda: torch.bmm(wider.expand(8, -1, -1), more),
        "w2 and its column": lambda: F.pad(w2, (0, 8))[:, HIDDEN].copy_(b2),
        "gelu torch": lambda: F.gelu(before, approximate="tanh"),
        "gelu triton": lambda: bias_gelu(before, b1, hidden, True),
        "gelu triton, a row of ones": lambda: bias_gelu(before, b1, more, True),
        "gelu bwd torch": lambda: torch.ops.aten.gelu_backward(hidden, before, approximate="tanh"),
        "gelu bwd triton": lambda: bias_gelu_backward(hidden, before, b1, True),
        "w2' dy bmm": lambda: torch.bmm(w2.mT.expand(8, -1, -1), dy),
        "w1' dh bmm": lambda: torch.bmm(w1.mT.expand(8, -1, -1), before),
        "dy h' bmm": lambda: torch.bmm(dy, hidden.mT),
        "dy h' bmm sum": lambda: torch.bmm(dy, hidden.mT).sum(0),
        "dh x' bmm sum": lambda: torch.bmm(before, x.mT).sum(0),
        "dy sum": lambda: dy.sum((0, 2)),
        "dy bmm ones": lambda: torch.bmm(dy, ones).sum(0),
        "dy sum last, then first": lambda: dy.sum(2, dtype=torch.float32).sum(0),
    }

    def looped(a, b):
        total = a.new_zeros(a.shape[1], b.shape[1], dtype=torch.float32)
        for i in range(a.shape[0]):
            torch.addmm(total, a[i], b[i].mT, out_dtype=torch.float32, out=total)
        return total

    parts["dy h' addmm float32"] = lambda: looped(dy, hidden)
    parts["dh x' addmm float32"] = lambda: looped(before, x)
    parts["dy copied h' one mm"] = lambda: torch.mm(dy.transpose(0, 1).flatten(1), hidden.transpose(0, 1).flatten(1).mT)
    parts["x^T one mm (bound)"] = lambda: torch.mm(y.view(4096, -1), hidden.view(HIDDEN, -1).mT)
    run_parts("token_mlp", parts)


def linformer_parts():
    q, k, v, E, _ = draw_linformer(8, 4096)
    from zoo.ops.linformer_attention.kernels.backward import attend_backward
    from zoo.ops.linformer_attention.kernels.forward import attend
    from zoo.ops.linformer_attention.kernels.project import project
    from zoo.ops.linformer_attention.triton_path import outer, spread

    wide = E.expand(8, -1, -1)
    keys = torch.bmm(wide, k.flatten(2)).unflatten(2, (HEADS, 64))
    dy = r(*q.shape)
    turned = [t.transpose(1, 2) for t in (q, keys, keys)]
    backends = torch.nn.attention.SDPBackend
    kinds = {"flash": backends.FLASH_ATTENTION, "cudnn": backends.CUDNN_ATTENTION}

    def sdpa(kind, back):
        leaves = [t.detach().requires_grad_(back) for t in turned]
        with torch.nn.attention.sdpa_kernel(kind):
            y = F.scaled_dot_product_attention(*leaves)
            return torch.autograd.grad(y, leaves, dy.transpose(1, 2)) if back else y

    parts = {
        "E k triton": lambda: project(E, k, None),
        "E k bmm": lambda: torch.bmm(wide, k.flatten(2)),
        "attend triton": lambda: attend(q, keys, keys, None),
        "attend backward triton": lambda: attend_backward(dy, q, keys, keys, None),
        "E' dkeys": lambda: spread(E, keys),
        "dkeys k'": lambda: outer(keys, k, 2),
        "sum of 3 cat": lambda: torch.cat([q, k, v], 2),
    }
    for name, kind in kinds.items():
        parts[f"sdpa {name}"] = lambda kind=kind: sdpa(kind, False)
        parts[f"sdpa {name} forward and backward"] = lambda kind=kind: sdpa(kind, True)
    run_parts("linformer", parts)


def held_rows():
    """(direction, tiles) of the kernels that keep the keys, the present ones first."""
    from zoo.ops.linformer_attention.kernels import tiles

    forward = [tiles.FORWARD, (128, 8, 2, 1, 8, 1), (64, 4, 1, 2, 16, 1), (64, 8, 2, 1, 16, 1)]
    backward = [tiles.BACKWARD, (64, 8, 2, 1, 8, 2), (32, 8, 2, 1, 16, 2), (64, 8, 1, 1, 8, 2), (64, 8, 2, 1, 8, 1)]
    return [("FORWARD", each) for each in forward] + [("BACKWARD", each) for each in backward]


def drawn(batch, tokens, heads):
    q, k, v, _, _ = draw_linformer(batch, tokens, heads)
    return q, k[:, :RANK].contiguous() * 0.5, v[:, :RANK].contiguous(), r(*q.shape)


def held(given, kept=None):
    """Forward, and backward from its results."""
    from zoo.ops.linformer_attention.kernels.held import attend_held, attend_held_backward

    if kept is None:
        return attend_held(*given[:3], None, True)
    return attend_held_backward(given[3], given[0], kept[0], *given[1:3], kept[1], None)


def held_parts():
    """The kernels that keep the keys: tiles of each direction, checked on a smaller draw."""
    from zoo.ops.linformer_attention.kernels import tiles

    small, large = drawn(2, 2112, 16), drawn(8, 4096, HEADS)
    exact = [t.double().transpose(1, 2).detach().requires_grad_() for t in small[:3]]
    y = F.scaled_dot_product_attention(*exact)
    truth = [y.detach(), *torch.autograd.grad(y, exact, small[3].double().transpose(1, 2))]
    default = tiles.FORWARD, tiles.BACKWARD
    for kind, each in held_rows():
        try:
            tiles.FORWARD, tiles.BACKWARD = default
            setattr(tiles, kind, each)
            results = held(small)
            results = [results[0], *held(small, results)]
            error = max(
                float((a.double().transpose(1, 2) - e).norm() / e.norm()) for a, e in zip(results, truth, strict=True)
            )
            kept = held(large) if kind == "BACKWARD" else None
            tell(held=kind, ms=ms(lambda kept=kept: held(large, kept)), error=error, tiles=each)
        except Exception as problem:
            tell(held=kind, tiles=each, error=f"{type(problem).__name__}: {problem}"[:160])
    tiles.FORWARD, tiles.BACKWARD = default


def warm(child):
    """Compile a share of the variants, in a process of its own."""
    from zoo.ops.linformer_attention.kernels import tiles

    small = drawn(2, 2112, 16)
    for place, (kind, each) in enumerate(held_rows()):
        if place % CHILDREN == child:
            setattr(tiles, kind, each)
            kept = held(small)
            if kind == "BACKWARD":
                held(small, kept)
    torch.cuda.synchronize()


def run_parts(op, parts):
    for name, run in parts.items():
        if time.perf_counter() - BEGUN > LIMIT:
            tell(part=op, name=name, left_out="time")
            continue
        try:
            tell(part=op, ms=ms(run), name=name)
        except Exception as error:
            tell(part=op, name=name, error=f"{type(error).__name__}: {error}"[:160])


def main():
    if sys.argv[1:2] == ["--warm"]:
        warm(int(sys.argv[2]))
        return
    children = [subprocess.Popen([sys.executable, __file__, "--warm", str(i)]) for i in range(CHILDREN)]
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    try:
        check()
    except Exception as error:
        tell(error=f"{type(error).__name__}: {error}"[:300])
    for child in children:
        try:
            child.wait(max(1.0, 40 - (time.perf_counter() - BEGUN)))
        except subprocess.TimeoutExpired:
            child.kill()
    for step in (lambda: whole(4096), held_parts, profile, mlp_parts, linformer_parts, lambda: whole(1024)):
        if time.perf_counter() - BEGUN > LIMIT:
            tell(left_out="time")
            break
        try:
            step()
        except Exception as error:
            tell(error=f"{type(error).__name__}: {error}"[:300])
    out = Path(os.environ.get("OUT", "."))
    (out / "token.json").write_text(json.dumps(ROWS, indent=1))
    print(f"{time.perf_counter() - BEGUN:.1f} s", flush=True)


if __name__ == "__main__":
    main()

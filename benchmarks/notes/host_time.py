"""Host time of operator calls: how long Python takes to put one call on the stream, and where it goes.

    python benchmarks/notes/host_time.py              GPU, about 40 s; lines as they come, JSON to $OUT/host_time.json
    python benchmarks/notes/host_time.py ssd linear   only these rows

Sizes are tiny, so that the GPU keeps up and the wall clock of 200 calls without a sync is the host's time. Each row:
eager microseconds per call with `LaunchedFunction.direct` off and on (in turns, least of 3 rounds of 40 calls), time
of the same call in a CUDA graph (the GPU's own), then the 25 heaviest functions of four operators.
Kernels are compiled first, by a process for each row. Then results with the short way on and off are compared bit for
bit, over two alignments and several lengths.
"""

from __future__ import annotations

import cProfile
import io
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path[:0] = [ROOT, os.path.join(ROOT, "specs"), os.path.join(ROOT, "plugins")]

import zoo.ops.direct as direct_way  # noqa: E402

LONG = "--long-way" in sys.argv
if LONG:
    direct_way.shorten = lambda op: False  # operators as torch.library.custom_op made them

import benchmarks.operator_rows as rows  # noqa: E402
from zoo.ops.kernels.launcher import LaunchedFunction  # noqa: E402

ROWS = {
    "linear": rows.linear(2, 256, 4, 64),
    "linear normalised": rows.linear(2, 256, 4, 64, True),
    "ssd": rows.ssd(2, 256, 4, 64, 64),
    "lti_scan": rows.lti(2, 64, 256),
    "ssd step": rows.ssd_step(8, 8, 64, 64),
    "short convolution": rows.convolution(2, 256, 256),
    "gated norm": rows.norm(512, 256),
    "selective": rows.selective(2, 256, 256),
    "long": rows.long(2, 64, 256),
}
PROFILED = ("linear", "ssd", "lti_scan", "ssd step")
LIMIT = float(os.environ.get("LIMIT", "32"))
BEGUN = time.perf_counter()


def say(*words: Any, **how: Any) -> None:
    print(*words, flush=True, **how)


def left() -> float:
    return LIMIT - (time.perf_counter() - BEGUN)


def calls_of(work: Any) -> dict[str, Callable[[], Any]]:
    """The call without gradients and, where it has one, with its backward."""
    wanted = [t for t in work.inputs.values() if t.requires_grad]

    def first(made: Any) -> torch.Tensor:
        return made[0] if isinstance(made, tuple) else made

    def forward() -> Any:
        with torch.no_grad():
            return work.call("triton")

    cotangent = first(forward())
    found = {"forward": forward}
    if wanted:
        cotangent = torch.ones_like(cotangent)

        def both() -> Any:
            return torch.autograd.grad(first(work.call("triton")), wanted, cotangent, allow_unused=True)

        found["f+b"] = both
    return found


def eager(call: Callable[[], Any], rounds: int = 3, count: int = 40) -> float:
    """Microseconds of host per call: least of the rounds, none of which waits for the GPU."""
    best = float("inf")
    for _ in range(rounds):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - begun) / count)
    return best * 1e6


def graph(call: Callable[[], Any]) -> float:
    """Microseconds of the GPU per call, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        kept = call()  # noqa: F841  outputs live as long as the graph
    captured.replay()
    times = []
    for _ in range(5):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        for _ in range(20):
            captured.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) / 20 * 1e3)
    return statistics.median(times)


def flat(made: Any) -> list[torch.Tensor]:
    parts = made if isinstance(made, (tuple, list)) else [made]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def compare(name: str, work: Any) -> None:
    """Bitwise: the short way (twice, so that the second call is a remembered one) against Triton's."""
    for kind, call in calls_of(work).items():
        LaunchedFunction.direct = False
        wanted = [part.clone() for part in flat(call())]
        LaunchedFunction.direct = True
        for turn in ("first", "remembered"):
            made = flat(call())
            same = all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
            if not same and "step" not in name:  # a step moves its state, so calls differ
                say(f"DIFFERS {name} {kind} {turn}")


def alignments() -> None:
    """One kernel, remembered for aligned tensors, then called with one that begins 2 bytes further, and other sizes."""
    from zoo.ops.semiseparable.kernels import walk_launch

    for tokens, offset in ((128, 0), (128, 1), (128, 0), (1, 0), (131, 1), (131, 0), (128, 1)):
        q, k, v = (torch.randn(2 * tokens * 4 * 64 + 8, device="cuda").bfloat16() for _ in range(3))
        q, k, v = (part[offset : offset + 2 * tokens * 4 * 64].view(2, tokens, 4, 64) for part in (q, k, v))
        made = []
        for direct in (False, True, True):
            LaunchedFunction.direct = direct
            made.append(walk_launch.linear_forward(q, k, v, None, None, False, 1e-6, 0.5)[:2])
        assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True)), (
            tokens,
            offset,
        )
    say("alignments, lengths: equal bit for bit")


def profile(name: str, call: Callable[[], Any], count: int = 100) -> None:
    torch.cuda.synchronize()
    seen = cProfile.Profile()
    seen.enable()
    for _ in range(count):
        call()
    seen.disable()
    text = io.StringIO()
    pstats.Stats(seen, stream=text).sort_stats("tottime").print_stats(25)
    say(f"== {name}: {count} calls")
    say("\n".join(line.replace(ROOT + "/", "") for line in text.getvalue().splitlines() if line.strip()))


def warm(names: list[str]) -> None:
    """Compile each row's kernels into Triton's cache on disk, side by side."""
    children = {
        name: subprocess.Popen([sys.executable, __file__, "--warm", name], stdout=subprocess.DEVNULL)
        for name in ["alignments", *names]
    }
    for name, child in children.items():
        try:
            if child.wait(max(0.1, left() - 11)):
                say(f"{name}: compiling ended with {child.returncode}")
        except subprocess.TimeoutExpired:
            say(f"{name}: still compiling")
            child.kill()
    say(f"compiled after {LIMIT - left():.0f} s")


def compile_row(name: str) -> None:
    if name == "alignments":
        alignments()
    else:
        for call in calls_of(ROWS[name]("cuda")).values():
            call()


def main(names: list[str]) -> None:
    import triton

    names = names or list(ROWS)
    if not LONG:
        warm(names)
    say(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    say("direct by default:", LaunchedFunction.direct, "operators shortened:", len(direct_way.SHORTENED))
    if not LONG:
        try:
            alignments()
        except Exception as error:
            say(f"ALIGNMENTS FAIL: {error!r}"[:300])
    results: dict[str, Any] = {}
    ready = {}
    for name in names:
        if left() < 4:
            break
        try:
            work = ROWS[name]("cuda")
            compare(name, work)
            for kind, call in calls_of(work).items():
                ready[name, kind] = call
                times: dict[bool, float] = {}
                for direct in (False, True, False, True):
                    LaunchedFunction.direct = direct
                    times[direct] = min(times.get(direct, float("inf")), eager(call))
                results[f"{name} {kind}"] = {"triton": times[False], "direct": times[True]}
                say(
                    f"{name:18} {kind:8} host us: through Triton {times[False]:7.1f}  direct {times[True]:7.1f}",
                    end="  ",
                )
                try:
                    results[f"{name} {kind}"]["graph"] = graph(call)
                    say(f"graph {results[f'{name} {kind}']['graph']:7.1f}")
                except Exception as error:
                    say("no graph:", repr(error)[:100])
        except Exception as error:  # one row shall not stop the others
            say(f"{name}: {error!r}"[:300])
    LaunchedFunction.direct = True
    if LONG:
        return
    say("== the same with operators as torch.library.custom_op makes them")
    subprocess.run(
        [sys.executable, __file__, "--long-way", "linear", "ssd step", "gated norm"], timeout=60, check=False
    )
    for name in PROFILED:
        for kind in ("forward", "f+b"):
            if (name, kind) in ready and left() > 2:
                profile(f"{name} {kind}", ready[name, kind])
    if "OUT" in os.environ:
        with open(os.path.join(os.environ["OUT"], "host_time.json"), "w") as out:
            json.dump(results, out, indent=1)
    say(f"{time.perf_counter() - BEGUN:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--warm"]:
        compile_row(sys.argv[2])
    else:
        main([word for word in sys.argv[1:] if not word.startswith("--")])

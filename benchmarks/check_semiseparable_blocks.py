"""Which blocks of the semiseparable kernels are right on this GPU: each one in a process of its own.

For every width and dtype the blocks that `sizes_of` chooses are run forward and backward and judged against float64;
where they are wrong, crash or do not fit, others are tried, and the first that is right is named. Some are miscompiled
for Hopper by Triton up to 3.7.0. `python benchmarks/check_semiseparable_blocks.py [--workers 14] [--out FILE.json]`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WIDTHS = (16, 32, 64, 128, 256)  # N
CHANNELS = (16, 32, 64, 128)  # P
DTYPES = ("float32", "bfloat16", "float16")
OTHERS: tuple[dict[str, int], ...] = (
    {"num_warps": 8}, {"CHUNK": 32}, {"CHUNK": 32, "num_warps": 8}, {"num_stages": 1}, {"num_warps": 2},
    {"CHUNK": 32, "num_warps": 2}, {"BLOCK_P": 16}, {"BLOCK_P": 64}, {"CHUNK": 16, "num_warps": 2},
)  # fmt: skip
TOKENS, BATCH, HEADS = 193, 2, 4


def right(case: dict[str, Any]) -> str:
    """Run one case here: "right", or what is wrong with it."""
    import torch
    from zoo.ops.semiseparable import semiseparable
    from zoo.ops.semiseparable.kernels import launch

    from sequence_mixer.conformance.budget import judge

    chosen = launch.sizes_of

    def sizes_of(*arguments: Any) -> Any:
        size = chosen(*arguments)
        blocks = size.blocks | case["blocks"]
        channels = arguments[1].shape[3]
        slots = size.slots * size.blocks["CHUNK"] // blocks["CHUNK"] + BATCH
        columns = -(-channels // blocks["BLOCK_P"])
        return dataclasses.replace(size, blocks=blocks, slots=slots, column_blocks=columns)

    if case["blocks"]:
        launch.sizes_of = sizes_of
    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    N, P = case["N"], case["P"]
    given = {
        "q": torch.randn(BATCH, TOKENS, 2, N, device="cuda").to(dtype) / N**0.5,
        "k": torch.randn(BATCH, TOKENS, 2, N, device="cuda").to(dtype),
        "v": torch.randn(BATCH, TOKENS, HEADS, P, device="cuda").to(dtype),
        "log_decay": -0.2 * torch.rand(BATCH, TOKENS, HEADS, device="cuda"),
        "scale": torch.rand(BATCH, TOKENS, HEADS, device="cuda"),
        "initial_state": torch.randn(BATCH, HEADS, P, N, device="cuda"),
    }

    def run(backend: str, wide: bool) -> dict[str, torch.Tensor]:
        leaves = {n: (t.double() if wide else t.clone()).requires_grad_() for n, t in given.items()}
        y, state = semiseparable(
            leaves["q"], leaves["k"], leaves["v"], leaves["log_decay"], scale=leaves["scale"],
            initial_state=leaves["initial_state"], backend=backend,
        )  # fmt: skip
        source = torch.Generator().manual_seed(7)
        weights = [torch.randn(part.shape, generator=source).bfloat16().to("cuda") for part in (y, state)]
        loss = (y.double() * weights[0]).sum() + (state.double() * weights[1]).sum()
        return {"y": y, "state": state} | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))

    exact, plain, got = run("chunked", True), run("chunked", False), run("triton", False)
    torch.cuda.synchronize()
    wrong = []
    for name, value in got.items():
        verdict = judge(value, exact[name], plain[name], dtype)
        if not verdict.ok:
            wrong.append(f"{name} {verdict.error:.1e} of {verdict.allowed:.1e}")
    return "; ".join(wrong) or "right"


def outcome(case: dict[str, Any]) -> str:
    """`right` in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "took more than 120 s"
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return lines[-1]
    return (done.stderr.strip().splitlines() or ["died"])[-1][:160]


def settle(case: dict[str, Any]) -> list[tuple[dict[str, int], str]]:
    """The chosen blocks, then others until one is right: (changes, outcome) of each."""
    tried = []
    for blocks in ({}, *OTHERS):
        tried.append((blocks, outcome({**case, "blocks": blocks})))
        if tried[-1][1] == "right":
            break
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.case:
        print(right(json.loads(options.case)))
        return
    cases = [dict(zip(("dtype", "N", "P"), each)) for each in itertools.product(DTYPES, WIDTHS, CHANNELS)]
    with ThreadPoolExecutor(options.workers) as pool:
        found = list(pool.map(settle, cases))
    for case, tried in zip(cases, found):
        if len(tried) > 1 or tried[0][1] != "right":
            print(case, *(f"\n    {blocks}: {told}" for blocks, told in tried))
    print(f"{sum(tried[0][1] == 'right' for tried in found)} of {len(cases)} chosen blocks are right")
    if options.out:
        options.out.write_text(json.dumps([{**c, "tried": t} for c, t in zip(cases, found)], indent=1))


if __name__ == "__main__":
    main()

"""The cases of `zoo bench` under pytest-benchmark: `pytest benchmarks`, over the registry.

A mixer whose conformance suite is red on the default example is not timed.
"""

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from zoo.bench.cases import Case, cases, prepare, sizes_for
from zoo.bench.machine import describe_machine
from zoo.bench.run import conformance_row
from zoo.registry import registry

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SIZES = sizes_for(DEVICE)
CASES = [case for name in registry.names() for case in cases(name, SIZES)]


@functools.cache
def verdict(name: str) -> str:
    return str(conformance_row(name, DEVICE)["verdict"])


@functools.cache
def machine() -> dict[str, object]:
    return describe_machine(DEVICE)


@pytest.mark.parametrize("case", CASES, ids=[case.key.replace(" | ", "-").replace(" ", "_") for case in CASES])
def test_time(case: Case, benchmark: BenchmarkFixture) -> None:
    if verdict(case.mixer) != "green":
        pytest.skip(f"not timed: conformance of {case.mixer} is {verdict(case.mixer)}")
    ready = prepare(case, SIZES.d_model, DEVICE, DTYPE)

    def call() -> None:
        ready.run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(
        **machine(), dtype=str(DTYPE), mixer=case.mixer, kind=case.kind, batch=case.batch, length=case.length,
        d_model=SIZES.d_model, backend=ready.mixer.backend, flops=ready.flops, bytes=ready.bytes,
        state_bytes=ready.state_bytes,
    )  # fmt: skip
    benchmark.group = f"{case.kind}, T = {case.length}"
    benchmark.pedantic(call, rounds=10, warmup_rounds=2, iterations=1)

"""The cases of `zoo bench` under pytest-benchmark: `pytest benchmarks`, over the registry.

A mixer whose conformance suite is red on the default example is not timed. Two lengths by default, small on a CPU;
`ZOO_BENCH_LENGTHS=1024,4096` takes others. `--benchmark-json FILE` stores the device, versions, commit and the cost
model's numbers beside the times.
"""

import dataclasses
import functools
import os

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from zoo.bench.cases import Case, Sizes, cases, prepare, sizes_for
from zoo.bench.conformance import conformance_row
from zoo.bench.machine import describe_machine
from zoo.registry import registry

from sequence_mixer.errors import MixerError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CHECKED_FOR = 5.0  # seconds of the conformance suite per mixer
ROUNDS, WARM_UP = 5, 2


def chosen_sizes() -> Sizes:
    """The default sizes of the device at two lengths, with fewer tokens on a CPU."""
    sizes = sizes_for(DEVICE)
    few = "256,1024" if DEVICE.type == "cpu" else "2048,8192"
    lengths = [int(word) for word in os.environ.get("ZOO_BENCH_LENGTHS", few).split(",")]
    if DEVICE.type == "cpu":
        sizes = dataclasses.replace(sizes, tokens=1024)
    return sizes.changed(tuple(lengths), None)


SIZES = chosen_sizes()


def every_case() -> list[Case]:
    """Cases of the mixers that load, length by length, so that mixers take turns."""
    found: list[Case] = []
    for name in registry.names():
        try:
            found += cases(name, SIZES)
        except MixerError:  # test_mixer_loads says so
            continue
    return sorted(found, key=lambda case: (case.length, case.kind))


CASES = every_case()


@functools.cache
def verdict(name: str) -> str:
    return str(conformance_row(name, DEVICE, CHECKED_FOR)["verdict"])


@functools.cache
def machine() -> dict[str, object]:
    return describe_machine(DEVICE)


@pytest.mark.parametrize("name", registry.names())
def test_mixer_loads(name: str) -> None:
    registry.definition(name)


@pytest.mark.parametrize("case", CASES, ids=[case.key.replace(" | ", "-").replace(" ", "_") for case in CASES])
def test_time(case: Case, benchmark: BenchmarkFixture) -> None:
    if not verdict(case.mixer).startswith("green"):
        pytest.skip(f"not timed: conformance of {case.mixer} is {verdict(case.mixer)}")
    ready = prepare(case, SIZES.d_model, DEVICE, DTYPE)

    def call() -> None:
        ready.run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(
        **machine(), dtype=str(DTYPE), mixer=case.mixer, kind=case.kind, batch=case.batch, length=case.length,
        d_model=SIZES.d_model, backend=ready.mixer.backend, parameters=ready.parameters, forward_flops=ready.flops,
        forward_bytes=ready.bytes, state_bytes=ready.state_bytes, conformance=verdict(case.mixer),
    )  # fmt: skip
    benchmark.group = f"{case.kind}, T = {case.length}"
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=WARM_UP, iterations=1)

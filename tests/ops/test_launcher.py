"""The short way to launch kernels takes the kernel that Triton itself would take, or leaves the call to Triton."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from zoo.ops.kernels.launcher import MOST, Constants, LaunchedFunction, known_version, launched, start  # noqa: E402

WHERE = -1  # the device that tensors on a CPU name
STREAM = 11


def _kernel(x_ptr, y_ptr, n, length, factor, flag, N: tl.constexpr, MODE: tl.constexpr, WIDE: tl.constexpr = 7):
    tl.store(y_ptr, tl.load(x_ptr) * factor)


def _scale(x_ptr, y_ptr, n, step, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + at * step, mask=at < n, other=0.0)
    tl.store(y_ptr + at, (value * factor).to(y_ptr.dtype.element_ty), mask=at < n)


class Driver:
    """What a launch asks of a GPU's driver."""

    def get_current_device(self) -> int:
        return WHERE

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Compiled(CompiledKernel):
    """A kernel without a binary, which notes how it is started."""

    def __init__(self, name: str) -> None:
        self.name, self.function, self.packed_metadata, self.module = name, object(), (4, 1, 0), None
        self.started: list[tuple[Any, ...]] = []
        self._run = lambda *args: self.started.append(args)

    def __del__(self) -> None:
        pass

    def launch_metadata(self, *args: Any) -> None:
        return None


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A driver without a GPU and a compiler that makes nothing; lists the calls that Triton itself served."""
    served: list[tuple[Any, ...]] = []
    run = JITFunction.run

    def compile_nothing(self: Any, key: str, signature: Any, device: int, *rest: Any) -> Compiled:
        made = self.device_caches[device][0][key] = Compiled(key)
        return made

    def counted(self: Any, *args: Any, **named: Any) -> Any:
        served.append(args)
        return run(self, *args, **named)

    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.setattr(LaunchedFunction, "direct", True)
    return served


def make(**options: Any) -> LaunchedFunction:
    return LaunchedFunction(_kernel, do_not_specialize=["length"], **options)


def begin(offset: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor whose address is `offset` elements past a multiple of 64."""
    room = torch.zeros(96, dtype=dtype)
    start = -(room.data_ptr() // dtype.itemsize) % (64 // dtype.itemsize)
    return room[start + offset : start + offset + 16]


def test_every_call_gets_the_kernel_that_triton_takes(through_triton: list[Any]) -> None:
    kernel, draw = make(), random.Random(0)
    integers = [0, 1, 2, 16, 17, 32, -16, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**40 + 1]
    tensors = [begin(at, dtype) for at in (0, 1, 4, 8) for dtype in (torch.float32, torch.bfloat16)] + [None]
    tensors += [torch.nn.Parameter(begin()), torch.nn.Parameter(begin(1))]
    kept: dict[str, set[int]] = {}
    for _ in range(3000):
        args = (
            draw.choice(tensors), draw.choice(tensors[:4]), draw.choice(integers), draw.choice(integers),
            draw.choice([0.5, 1.0, 3, True]), draw.choice([True, False, None, 1]),
        )  # fmt: skip
        named = {"N": draw.choice([1, 16, 33]), "MODE": draw.choice(["", "rows"]), "num_warps": draw.choice([4, 8])}
        if draw.random() < 0.3:
            named["WIDE"] = draw.choice([7, 8])
        if draw.random() < 0.3:
            named = dict(reversed(named.items()))
        taken = kernel[(5, 2)](*args, **named)
        wanted = JITFunction.run(kernel, *args, grid=(5, 2), warmup=False, **named)
        assert taken is wanted
        kept.setdefault(taken.name, set()).add(id(taken))
        short, whole = taken.started[-2], taken.started[-1]  # ours, and Triton's own
        for got, asked in zip(short, whole, strict=True):
            if isinstance(asked, torch.Tensor):
                assert got is asked or got == asked.data_ptr()
            elif not hasattr(asked, "calls"):  # no hook
                assert type(got) is type(asked)
                assert got == asked
    assert len(through_triton) < 2 * 3000, "nothing was remembered"


def test_a_remembered_call_does_not_pass_through_triton(through_triton: list[Any]) -> None:
    kernel, x, y = make(), begin(), begin()
    for n in (32, 48, 64, 32):
        taken = kernel[(3,)](x, y, n, n + 1, 0.5, False, N=4, MODE="rows")
    assert len(through_triton) == 1, "integers that are multiples of 16 share a kernel"
    run = (3, 1, 1, STREAM, taken.function, taken.packed_metadata, None, None, None)
    assert taken.started[-1] == (*run, x.data_ptr(), y.data_ptr(), 32, 33, 0.5, False, 4, "rows", 7)


def test_keys_tell_apart(through_triton: list[Any]) -> None:
    kernel, x, y = make(), begin(), begin()
    plain = (x, y, 32, 5, 0.5, False)

    def compiled(*args: Any, **named: Any) -> Any:
        for _ in range(2):
            taken = kernel[(1,)](*args, **({"N": 4, "MODE": ""} | named))
        return taken

    first = compiled(*plain)
    for at, other in [(0, begin(1)), (0, begin(0, torch.bfloat16)), (0, None), (2, 1), (2, 33), (3, 2**33), (4, 2)]:
        assert compiled(*plain[:at], other, *plain[at + 1 :]) is not first
    for named in ({"N": 5}, {"MODE": "rows"}, {"num_warps": 8}, {"num_stages": 5}, {"WIDE": 8}):
        assert compiled(*plain, **named) is not first
    for at, other in [(1, begin(4)), (2, 64), (3, 1), (3, 16), (4, 0.25), (5, True)]:
        assert compiled(*plain[:at], other, *plain[at + 1 :]) is first


def test_calls_that_cannot_be_remembered_go_to_triton(through_triton: list[Any], monkeypatch: Any) -> None:
    kernel, x, y = make(), begin(), begin()
    call = (x, y, 32, 5, 0.5, False)
    for grid, args, named in [
        (lambda _: (1,), call, {"N": 4, "MODE": ""}),
        ([1], call, {"N": 4, "MODE": ""}),
        ((1,), call[:5], {"flag": False, "N": 4, "MODE": ""}),
        ((1,), (x, y, 2**31, 5, 0.5, False), {"N": 4, "MODE": ""}),
        ((1,), (x, y, 32, 2**31, 0.5, False), {"N": 4, "MODE": ""}),
    ]:
        before = len(through_triton)
        for _ in range(3):
            kernel[grid](*args, **named)
        assert len(through_triton) == before + 3
    monkeypatch.setattr(Driver, "get_current_device", lambda self: 0)  # the tensors are not there
    before = len(through_triton)
    for _ in range(3):
        kernel[(1,)](*call, N=4, MODE="")
    assert len(through_triton) == before + 3


def test_whoever_watches_launches_sees_them(through_triton: list[Any], monkeypatch: Any) -> None:
    kernel, x, y = make(), begin(), begin()

    def call() -> int:
        before = len(through_triton)
        kernel[(1,)](x, y, 32, 5, 0.5, False, N=4, MODE="")
        return len(through_triton) - before

    def hook(*_: Any, **__: Any) -> None:
        pass

    assert [call(), call()] == [1, 0]
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        assert call() == 1
        chain.remove(hook)
        assert call() == 0
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "debug", True)
        assert call() == 1
    kernel.add_pre_run_hook(hook)
    assert call() == 1
    kernel.pre_run_hooks.clear()
    with monkeypatch.context() as patch:
        patch.setattr(LaunchedFunction, "direct", False)
        assert call() == 1
    assert call() == 0


def test_kept_constants_and_constants_by_position(through_triton: list[Any]) -> None:
    kernel, x, y = make(), begin(), begin()
    call = (x, y, 32, 5, 0.5, False)
    plain = kernel[(1,)](*call, N=4, MODE="rows", num_warps=8)
    for kept in (Constants(N=4, MODE="rows", num_warps=8), Constants(num_warps=8, MODE="rows", N=4)):
        assert len(kept) == 3
        before = len(plain.started)
        for _ in range(3):
            start(kernel, (1,), kept, *call)
        assert len(plain.started) == before + 3
        assert plain.started[-1][-3:] == (4, "rows", 7)
    other = Constants(N=5, MODE="rows", num_warps=8)
    start(kernel, (1,), other, *call)
    assert kernel[(1,)](*call, N=5, MODE="rows", num_warps=8) is not plain
    taken = [kernel[(1,)](*call, n, "rows", num_warps=8) for n in (4, 4, 5, True, 4)]
    assert taken[0] is taken[1] is taken[4] is plain
    assert taken[2] is not plain
    assert taken[2].started[-1][-3:] == (5, "rows", 7)


def test_memory_is_bounded(through_triton: list[Any]) -> None:
    kernel, x, y = make(), begin(), begin()
    for n in range(16, 16 * (2 * MOST), 16):
        kernel[(1,)](x, y, n, 5, 0.5, False, N=4, MODE="")
    (plan,) = kernel._plans.values()
    assert plan is not None
    assert len(plan.calls) <= MOST
    assert len(through_triton) == 1


def test_threads_share_a_kernel(through_triton: list[Any]) -> None:
    kernel, x, y, taken = make(), begin(), begin(1), []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(300):
            args = draw.choice([x, y]), x, draw.choice([1, 16, 17]), 5, 0.5, False
            wanted = (args[0] is x, args[2])
            taken.append((wanted, kernel[(1,)](*args, N=4, MODE="")))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 6 * 300
    names = {wanted: {kernel.name for case, kernel in taken if case == wanted} for wanted, _ in taken}
    assert all(len(found) == 1 for found in names.values())
    assert len(set.union(*names.values())) == 6


def test_versions() -> None:
    assert known_version("3.6.0")
    assert known_version("3.9.0+git1")
    assert not any(known_version(version) for version in ("3.5.1", "2.3.0", "4.0.0", "3", "main"))


def test_the_interpreter_gets_what_triton_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not isinstance(launched(_kernel), JITFunction)
    assert type(launched(_kernel)) is type(triton.jit(_kernel))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert isinstance(launched(_kernel), LaunchedFunction)
    made = launched(do_not_specialize=["n"])(_kernel)
    assert made.do_not_specialize == ["n"]
    assert made.params[2].do_not_specialize


@pytest.mark.skipif(not torch.cuda.is_available(), reason="starts real kernels, which needs a CUDA device")
def test_on_a_gpu_both_ways_agree() -> None:
    kernel = LaunchedFunction(_scale, do_not_specialize=["n"])
    draw = torch.Generator("cuda").manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        room = torch.randn(4096, device="cuda", generator=draw).to(dtype)
        for offset, step, n, factor in [(0, 1, 1000, 2.0), (1, 1, 999, 0.5), (0, 2, 16, 0.5), (8, 16, 100, 1.0)] * 2:
            x, y = room[offset:], torch.zeros(n, dtype=dtype, device="cuda")
            known = kernel[(triton.cdiv(n, 64),)](x, y, n, step, factor, BLOCK=64, num_warps=2)
            torch.testing.assert_close(y, x[: n * step : step][:n] * factor, rtol=0, atol=0)
            asked = kernel.run(x, y, n, step, factor, grid=(1,), warmup=False, BLOCK=64, num_warps=2)
            assert known is asked
    with pytest.raises(ValueError, match="cannot be accessed"):
        kernel[(1,)](room.cpu(), room, 4, 1, 1.0, BLOCK=64, num_warps=2)

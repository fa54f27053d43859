"""Launches a compiled kernel with little work of the host: `@launched` in place of `@triton.jit`.

`JITFunction.run` binds and specialises every argument and looks up what came out: 20 microseconds and more for the 30
to 70 arguments of our kernels. A `LaunchedFunction` is a JITFunction that remembers the kernel to which a call of its
`kernel[grid](...)` came, under a key that tells apart all that Triton tells apart: the device, the types of arguments,
of tensors the dtype and whether the address is a multiple of 16, of integers whether they are 1 or a multiple of 16, of
constants and options their names and values. A call that is not known, or cannot be (a tensor elsewhere, an integer
beyond 32 bits, an argument of another type, a grid to be computed), goes through `JITFunction.run`; so do all calls
while somebody watches launches (hooks of a profiler) or has changed Triton's settings in this process.

Source, global constants and environment variables are read when a kernel is compiled, not again for every launch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# Minor releases whose `CompiledKernel.run` takes (grid x, y, z, stream, function, packed metadata, launch metadata,
# enter hook, exit hook, *bound arguments) and, as pointers, integers too. Others launch as Triton does.
KNOWN = ((3, 6), (3, 9))
MOST = 512  # remembered calls of a kernel, for each sequence of types; past that it begins anew
BITS = 31  # of the integers a remembered call takes: Triton hands over longer ones as 64 bit

_TENSORS = (Tensor, torch.nn.Parameter)
_OTHERS = (int, float, bool, type(None))


def known_version(version: str) -> bool:
    """Whether the interface of compiled kernels in this version of Triton is one that the short way knows."""
    try:
        major, minor = version.split(".")[:2]
        return (int(major), int(minor)) in KNOWN
    except ValueError:
        return False


class Remembered(NamedTuple):
    """A compiled kernel and how to start it. rest: constants behind the positional arguments."""

    run: Callable[..., Any]
    function: Any
    metadata: Any
    rest: tuple[Any, ...]
    kernel: Any  # kept alive: what it loaded is unloaded with it


class Constants(dict[str, Any]):
    """Constants and options of a launch that a caller keeps and never changes: it is told apart by identity."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


class Plan:
    """What a key is made of, for positional arguments of one sequence of types; and the calls known by such keys.

    bind: of (device, constants, arguments) makes the key and the values to start a kernel with. Its source is written
    out for these types, as Triton does with its binders: loops over 60 arguments would take as long again.
    calls: by the values of integers, which is found fastest. kinds: by what Triton wants to know of them.
    """

    def __init__(self, types: Sequence[type], params: Sequence[Any]) -> None:
        places = range(len(types))
        constants = [at for at in places if params[at].is_constexpr]
        free = [at for at in places if types[at] is int and at not in constants]
        self.tensors = [at for at in places if types[at] in _TENSORS]
        self.unseen = [at for at in free if params[at].do_not_specialize]  # Triton does not specialise these
        self.integers = [at for at in free if at not in self.unseen]
        key = [f"a{at}.{what}" for what in ("dtype", "get_device()") for at in self.tensors]
        key += [f"p{at} & 15 == 0" for at in self.tensors] + [f"a{at}" for at in self.integers]
        key += [f"a{at}.bit_length() <= {BITS}" for at in self.unseen] + [f"a{at}" for at in constants]
        lines = [f"{''.join(f'a{at}, ' for at in places)} = args"] if types else []
        lines += [f"p{at} = a{at}.data_ptr()" for at in self.tensors]
        values = "".join(f"p{at}, " if at in self.tensors else f"a{at}, " for at in places)
        lines += [f"return ({', '.join(['device', *key, 'constants'])}), ({values})"]
        made: dict[str, Any] = {}
        exec("def bind(device, constants, args):\n    " + "\n    ".join(lines), made)
        self.bind: Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]] = made["bind"]
        self.calls: dict[tuple[Any, ...], Remembered] = {}
        self.kinds: dict[tuple[Any, ...], Remembered] = {}

    def kind(self, key: tuple[Any, ...]) -> tuple[Any, ...]:
        """The key with what Triton wants to know of integers in place of their values."""
        begin = 1 + 3 * len(self.tensors)
        end = begin + len(self.integers)
        return (*key[:begin], *map(_kind, key[begin:end]), *key[end:])


def _kind(number: int) -> tuple[int, bool]:
    """What Triton specialises an integer by, and whether it is short enough."""
    return 1 if number == 1 else (number & 15 == 0) * 16, number.bit_length() <= BITS


class LaunchedFunction(JITFunction):
    """A JITFunction that remembers its launches. direct: False sends every call through Triton (for comparison)."""

    direct = known_version(triton.__version__) and torch.version.hip is None  # AMD's key holds sizes of tensors too

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        super().__init__(fn, **options)
        self._plans: dict[tuple[type, ...], Plan | None] = {}

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **named: Any) -> Any:
            return self.start(grid, args, named)

        return launch

    def start(self, grid: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Start the kernel, by a way that is known if there is one. Returns the compiled kernel, as Triton does."""
        types = tuple(map(type, args))
        try:
            plan = self._plans[types]
        except KeyError:
            plan = self._plan(types)
        if plan is None or type(grid) is not tuple or not LaunchedFunction.direct or self.pre_run_hooks or _watched():
            return self.run(*args, grid=grid, warmup=False, **named)
        active = driver.active
        device = active.get_current_device()
        key, values = plan.bind(device, named if type(named) is Constants else (*named, *named.values()), args)
        try:
            found = plan.calls.get(key)
        except TypeError:  # a constant without a hash
            return self.run(*args, grid=grid, warmup=False, **named)
        if found is None:
            kind = plan.kind(key)
            found = plan.kinds.get(kind)
            if found is None:
                kernel = self.run(*args, grid=grid, warmup=False, **named)
                found = self._started(kernel, device, plan, args, named)
                if found is not None:
                    _keep(plan.kinds, kind, found)
                return kernel
            _keep(plan.calls, key, found)
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        run, function, metadata, rest, kernel = found
        run(x, y, z, active.get_current_stream(device), function, metadata, None, None, None, *values, *rest)
        return kernel

    def _plan(self, types: tuple[type, ...]) -> Plan | None:
        """The plan of positional arguments of these types; None if the short way does not know them all."""
        known = len(types) <= len(self.params) and all(
            kind in _OTHERS or (kind in _TENSORS) != param.is_constexpr
            for kind, param in zip(types, self.params, strict=False)
        )
        made = self._plans[types] = Plan(types, self.params) if known else None
        return made

    def _started(
        self, kernel: Any, device: int, plan: Plan, args: tuple[Any, ...], named: dict[str, Any]
    ) -> Remembered | None:
        """How to start the kernel that served a call again; None if not all calls with its key are served by it."""
        behind = self.params[len(args) :]
        if (
            not isinstance(kernel, CompiledKernel)  # still compiling, or refused by a hook
            or any(args[at].get_device() != device for at in plan.tensors)
            or any(args[at].bit_length() > BITS for at in (*plan.integers, *plan.unseen))
            or not all(param.is_constexpr and (param.name in named or param.has_default) for param in behind)
        ):
            return None
        rest = tuple(named.get(param.name, param.default) for param in behind)
        return Remembered(kernel.run, kernel.function, kernel.packed_metadata, rest, kernel)


def _keep(calls: dict[tuple[Any, ...], Remembered], key: tuple[Any, ...], call: Remembered) -> None:
    if len(calls) >= MOST:
        calls.clear()
    calls[key] = call


def _watched() -> bool:
    """Whether a hook waits for launches, or a setting that is part of Triton's own key has been changed."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
        or runtime.debug
        or knobs.compilation.instrumentation_mode
        or runtime.add_stages_inspection_hook is not None
    )


def start(kernel: Any, grid: tuple[int, ...], constants: Constants, *args: Any) -> None:
    """`kernel[grid](*args, **constants)`, a little faster."""
    if type(kernel) is LaunchedFunction:
        kernel.start(grid, args, constants)
    else:
        kernel[grid](*args, **constants)


def launched(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Decorator for a kernel that is launched from Python: `triton.jit` and its options, with cheap launches.

    Functions that kernels call are not launched and stay `triton.jit`. Under the interpreter it is `triton.jit`.
    """

    def decorate(fn: Callable[..., Any]) -> Any:
        if os.environ.get("TRITON_INTERPRET", "0") == "1" or knobs.runtime.interpret:
            return triton.jit(fn, **options)
        return LaunchedFunction(fn, **options)

    return decorate if fn is None else decorate(fn)

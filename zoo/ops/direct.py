"""The short way into a custom operator: what `torch.library.custom_op` does for every call, less what we do not need.

A `custom_op` call passes through checks and wrappers in Python that cost more host time than a small kernel runs. Here
a second, shorter set of kernels is registered beside them, for CPU and CUDA tensors: dispatch keys of a device come
before the general ones that `custom_op` registers, which stay and serve everything else (fakes, other devices). Left
out: the check that results do not alias arguments, which `opcheck` makes in the tests; defaults and keyword-only
arguments, which our operators do not have; a second pass through the dispatcher; and Dynamo's guard where no tracer is
at work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

DEVICES = ("CPU", "CUDA")  # dispatch keys

SHORTENED: set[str] = set()  # names of the operators that have a short way

_library = torch.library.Library("zoo", "IMPL")


def shorten(op: CustomOpDef) -> bool:
    """Register the short way into `op`; False if this torch or this operator does not allow it, which changes nothing.

    The gradient formula is looked up when it is needed, so it may be registered later.
    """
    try:
        overload, fn = op._opoverload, op._init_fn
        kernel = _without_tracer(fn)
        through = _through_autograd(op, overload, kernel)
    except AttributeError:  # a torch with other internals
        return False
    name = overload._schema.name
    if not name.startswith("zoo::") or any(a.has_default_value() or a.kwarg_only for a in overload._schema.arguments):
        return False
    for device in DEVICES:
        _library.impl(overload, kernel, device)
        _library.impl(overload, through, f"Autograd{device}", with_keyset=True)
    SHORTENED.add(name)
    return True


def _through_autograd(op: CustomOpDef, overload: Any, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd kernel of `op`: notes what changes in place, saves what its formula needs, calls what lies below.

    kernel: what serves plain tensors there; called at once where nothing else (a mode, a fake) comes in between.
    """
    below, grad_enabled = torch._C._AutoDispatchBelowAutograd, torch.is_grad_enabled
    any_requires_grad, changed = torch._C._any_requires_grad, torch.autograd.graph.increment_version
    written = [
        at
        for at, argument in enumerate(overload._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    keys_below = torch._C._after_ADInplaceOrView_keyset if written else torch._C._after_autograd_keyset
    plain = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device)) for device in DEVICES]

    def call_below(keys: Any, args: Any) -> Any:
        lower = keys & keys_below
        with below():
            return kernel(*args) if lower in plain else overload.redispatch(lower, *args)

    op._backward_fn, op._setup_context_fn  # noqa: B018  AttributeError here, not at the first call

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *args, keys = inputs
            output = call_below(keys, args)
            if op._setup_context_fn is not None:
                op._setup_context_fn(ctx=ctx, inputs=tuple(args), output=output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if op._backward_fn is None:
                raise RuntimeError(f"{overload} has no gradient")
            found = op._backward_fn(ctx, *grads)
            return (*found, None) if isinstance(found, tuple) else (found, None)

    Differentiable.__name__ = f"GradientOf_{overload._schema.name.replace('::', '_')}"
    apply = Differentiable.apply

    def through(keys: Any, *args: Any) -> Any:
        for at in written:
            changed(args[at])
        if grad_enabled() and any_requires_grad(*args):
            return apply(*args, keys)  # type: ignore[no-untyped-call]
        return call_below(keys, args)

    for part in (through, call_below, Differentiable.forward, Differentiable.backward):
        _never_trace(part)
    return through


def _without_tracer(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, with Dynamo switched off around it where it is on."""
    guarded = torch._disable_dynamo(fn)  # type: ignore[attr-defined]
    tracer = torch._C._dynamo.eval_frame.get_eval_frame_callback

    def kernel(*args: Any) -> Any:
        return fn(*args) if tracer() is None else guarded(*args)

    return _never_trace(kernel)


def _never_trace(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Tell Dynamo not to compile this frame if it meets it by itself; what it calls is not its business."""
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    frames.set_code_exec_strategy(fn.__code__, skip)
    return fn

"""What every custom operator of ours says the same way."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from torch._library.custom_ops import CustomOpDef

from zoo.ops.direct import shorten

COUNTER = "torch.utils.flop_counter"  # imports Triton, so it is not imported here


def refuse_higher_order(op: CustomOpDef, public_name: str, *, has_gradient: bool) -> None:
    """Make second derivatives and vmap of a fast path raise a sentence that names the way out; shorten its calls.

    op: the custom operator. public_name: the function of `zoo.ops` it serves.
    has_gradient: True for a forward operator, whose autograd formula is registered elsewhere; False for a backward
        operator, which gets one that raises.
    """

    def no_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"vmap over {public_name} is served by backend='reference' only; pass it")

    op.register_vmap(no_vmap)
    shorten(op)
    if has_gradient:
        return

    def no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(
            f"the fast paths of {public_name} have first derivatives only; pass backend='reference' for double backward"
        )

    op.register_autograd(no_second_derivative)


def flop_formula(op: Any, *, get_raw: bool = False) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator: torch's FLOP counter counts `op` (an overload packet, or several) by this formula.

    get_raw: the formula gets the tensors themselves instead of their shapes.
    It is handed over when somebody imports the counter, or at once if somebody has.
    """

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        if COUNTER in sys.modules:
            _hand_over(sys.modules[COUNTER], op, get_raw, formula)
        else:
            if _waiting not in sys.meta_path:
                sys.meta_path.insert(0, _waiting)
            _waiting.formulas.append((op, get_raw, formula))
        return formula

    return register


def _hand_over(counter: ModuleType, op: Any, get_raw: bool, formula: Callable[..., int]) -> None:
    if isinstance(op, list) or op not in counter.flop_registry:  # a later torch may bring a formula of its own
        counter.register_flop_formula(op, get_raw=get_raw)(formula)


class _WhenCounterIsImported(importlib.abc.MetaPathFinder):
    """Finds nothing itself; adds our formulas right after the counter's module has run."""

    def __init__(self) -> None:
        self.formulas: list[tuple[Any, bool, Callable[..., int]]] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                for op, get_raw, formula in self.formulas:
                    _hand_over(module, op, get_raw, formula)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


_waiting = _WhenCounterIsImported()

"""What every custom operator of ours says the same way."""

from __future__ import annotations

from typing import Any, NoReturn

from torch._library.custom_ops import CustomOpDef


def refuse_higher_order(op: CustomOpDef, public_name: str, *, has_gradient: bool) -> None:
    """Make second derivatives and vmap of a fast path raise a sentence that names the way out.

    op: the custom operator. public_name: the function of `zoo.ops` it serves.
    has_gradient: True for a forward operator, whose autograd formula is registered elsewhere; False for a backward
        operator, which gets one that raises.
    """

    def no_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"vmap over {public_name} is served by backend='reference' only; pass it")

    op.register_vmap(no_vmap)
    if has_gradient:
        return

    def no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(
            f"the fast paths of {public_name} have first derivatives only; pass backend='reference' for double backward"
        )

    op.register_autograd(no_second_derivative)

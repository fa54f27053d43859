"""The short way into a custom operator does what the operator does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.ops.custom import refuse_higher_order
from zoo.ops.direct import SHORTENED, shorten

calls: list[str] = []


@torch.library.custom_op("zoo::test_scaled", mutates_args=())
def scaled(x: Tensor, y: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    """factor x y, and a row that has no gradient."""
    calls.append("forward")
    return x * factor if y is None else x * y * factor, x.new_zeros(2)


@scaled.register_fake
def _(x: Tensor, y: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(2)


@torch.library.custom_op("zoo::test_scaled_backward", mutates_args=())
def scaled_backward(dout: Tensor, x: Tensor, y: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    if y is None:
        return dout * factor, x.new_empty(0)
    return dout * y * factor, dout * x * factor


@scaled_backward.register_fake
def _(dout: Tensor, x: Tensor, y: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if y is None else torch.empty_like(y)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.factor = inputs[2]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, drow: Tensor | None) -> tuple[Tensor | None, ...]:
    assert dout is not None and drow is None  # noqa: PT018
    dx, dy = scaled_backward(dout, *ctx.saved_tensors, ctx.factor)
    return dx, dy if ctx.needs_input_grad[1] else None, None


@torch.library.custom_op("zoo::test_moved", mutates_args=("state",))
def moved(x: Tensor, state: Tensor) -> Tensor:
    state.add_(x)
    return state * 2


@moved.register_fake
def _(x: Tensor, state: Tensor) -> Tensor:
    return torch.empty_like(state)


scaled.register_autograd(_differentiate, setup_context=_save)
for _op, _forward in ((scaled, True), (scaled_backward, False), (moved, True)):
    refuse_higher_order(_op, "scaled", has_gradient=_forward)


@pytest.fixture
def pair() -> Iterator[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    calls.clear()
    yield torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    torch.compiler.reset()


def test_these_operators_have_the_short_way() -> None:
    assert {"zoo::test_scaled", "zoo::test_scaled_backward", "zoo::test_moved"} <= SHORTENED
    assert "direct.py" in torch._C._dispatch_dump("zoo::test_scaled").split("AutogradCPU")[1].splitlines()[0]


def test_values_and_gradients(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    out, row = scaled(x, y, 3.0)
    assert out.requires_grad
    assert not row.requires_grad
    torch.testing.assert_close(out, x * y * 3)
    dx, dy = torch.autograd.grad(out.sum(), (x, y))
    torch.testing.assert_close((dx, dy), (y.detach() * 3, x.detach() * 3))
    alone, _ = scaled(x, None, 3.0)
    (dx,) = torch.autograd.grad(alone.sum(), x)
    torch.testing.assert_close(dx, torch.full_like(x, 3.0))
    with torch.no_grad():
        assert not scaled(x, y, 3.0)[0].requires_grad
    with torch.inference_mode():
        assert scaled(x, y, 3.0)[0].is_inference()


def test_higher_orders_are_refused(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    (dx,) = torch.autograd.grad(scaled(x, y, 3.0)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        dx.sum().backward()
    with pytest.raises(NotImplementedError, match="vmap over scaled"):
        torch.vmap(lambda part: scaled(part, None, 3.0)[0])(x.detach()[:, None])


def test_what_is_written_is_noted() -> None:
    x, state = torch.ones(3), torch.zeros(3)
    weight = torch.ones(3, requires_grad=True)
    kept = weight * state
    before = state._version
    torch.testing.assert_close(moved(x, state), torch.full((3,), 2.0))
    assert state._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()
    before = state._version
    with torch.inference_mode():
        moved(x, state)
    assert state._version > before


def test_an_operator_without_a_gradient_says_so() -> None:
    x = torch.ones(3, requires_grad=True)
    out = moved(x, torch.zeros(3))
    assert out.requires_grad
    with pytest.raises(RuntimeError, match="has no gradient"):
        out.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_opcheck_and_compile(pair: tuple[Tensor, Tensor], dynamic: bool) -> None:
    x, y = pair
    torch.library.opcheck(scaled, (x, y, 3.0))
    torch.library.opcheck(scaled, (x, None, 3.0))
    torch.library.opcheck(moved, (x.detach(), y.detach().clone()))
    compiled = torch.compile(
        lambda a, b: scaled(a, b, 2.0)[0].sin(), backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    out = compiled(x, y)
    torch.testing.assert_close(out, (x * y * 2).sin())
    wanted = torch.autograd.grad((x * y * 2).sin().sum(), (x, y))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (x, y)), wanted)


def test_a_tracer_that_is_at_work_does_not_enter(pair: tuple[Tensor, Tensor]) -> None:
    """After a graph break the tracer stays on; it must compile neither our frames nor the operator's."""
    x, y = pair
    frames: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        frames.append(graph.print_readable(print_output=False))
        return graph.forward

    @torch.compile(backend=backend)
    def broken(a: Tensor, b: Tensor) -> Tensor:
        a = a + 1
        torch._dynamo.graph_break()
        return torch.ops.zoo.test_scaled(a, b, 2.0)[0] + 1

    torch.testing.assert_close(broken(x, y), (x + 1) * y * 2 + 1)
    assert len(frames) == 2
    assert sum("test_scaled" in frame for frame in frames) == 1
    seen: list[Any] = []

    @torch._dynamo.disable(recursive=False)
    def outside() -> Tensor:
        seen.append(torch._C._dynamo.eval_frame.get_eval_frame_callback())
        return scaled(x, y, 2.0)[0]

    @torch.compile(backend=backend)
    def entry() -> Tensor:
        return outside()

    before = len(frames)
    torch.testing.assert_close(entry(), x * y * 2)
    assert seen != [None], "the tracer was not at work, so this shows nothing"
    assert len(frames) == before


def test_operators_of_others_are_left_alone() -> None:
    @torch.library.custom_op("zoo_elsewhere::identity", mutates_args=())
    def identity(x: Tensor) -> Tensor:
        return x.clone()

    assert not shorten(identity)

    @torch.library.custom_op("zoo::test_default", mutates_args=())
    def default(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor

    assert not shorten(default)
    torch.testing.assert_close(default(torch.ones(2)), torch.full((2,), 2.0))


def test_another_torch_gets_the_operator_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_after_autograd_keyset")

    @torch.library.custom_op("zoo::test_other_torch", mutates_args=())
    def other(x: Tensor) -> Tensor:
        return x + 1

    assert not shorten(other)

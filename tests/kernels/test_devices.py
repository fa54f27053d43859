"""Kernels run on the device of their tensors, whichever is the current one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.ops import random_attention, softmax_attention, synthetic_attention
from zoo.ops.kernels.devices import on_device

pytest.importorskip("triton")

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax_attention": lambda x: softmax_attention(x, x, x, backend="triton"),
    "synthetic_attention": lambda x: synthetic_attention(x, q=x, k=x, left=x, right=x, backend="triton"),
    "random_attention": lambda x: random_attention(x[0, :, :, :9].transpose(0, 1), x, backend="triton"),
}


def test_only_a_tensor_on_another_gpu_changes_the_device(monkeypatch: pytest.MonkeyPatch):
    entered: list[Any] = []

    @contextlib.contextmanager
    def enter(device: Any) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", enter)
    for index in (0, 1):
        there: Any = SimpleNamespace(is_cuda=True, get_device=lambda index=index: index, device=f"cuda:{index}")
        with on_device(there):
            pass
    with on_device(torch.zeros(1)):
        pass
    assert entered == ["cuda:1"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_tensors_on_another_gpu_are_served(name: str):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    found = []
    for device in ("cuda:0", "cuda:1"):
        leaf = torch.linspace(-1, 1, 9 * 2 * 16, device=device).reshape(1, 9, 2, 16).requires_grad_()
        y = CALLS[name](leaf)
        y.square().sum().backward()
        found.append((y.detach().cpu(), leaf.grad.cpu()))
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)

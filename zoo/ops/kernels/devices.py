"""Kernels are started on the device of their tensors: Triton takes the current one, which may be another."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which kernels go to the device of `tensor`; none on the current one or a CPU (the interpreter)."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)

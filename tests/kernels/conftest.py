"""Tests of Triton kernels: on a GPU as they are, on a CPU in Triton's interpreter, in a process of their own.

TRITON_INTERPRET is read when a kernel is decorated, so it cannot be switched on inside a running test session;
`make test` runs this folder a second time with it set.
"""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    pytest.skip("Triton kernels need a CUDA device, or TRITON_INTERPRET=1 (make test runs them so)")


@pytest.fixture(autouse=True)
def _leave_memory_to_other_processes() -> Iterator[None]:
    """Tests run in many processes on one GPU: what PyTorch keeps of a large test goes back after it."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()

"""Tests of Triton kernels: on a GPU as they are, on a CPU in Triton's interpreter, in a process of their own.

TRITON_INTERPRET is read when a kernel is decorated, so it cannot be switched on inside a running test session;
`make test` runs this folder a second time with it set.
"""

import os
from collections.abc import Iterator

import pytest
import torch

LONG = (  # ends of names: ten seconds and more in the interpreter, each beside a shorter test of the same thing
    "test_every_group_size_meets_the_definition[True-1]",
    "test_the_kernels_compile_whole[chunk-and-one]",
    "test_the_kernels_compile_whole[packed]",
    "test_outputs_states_and_gradients_stay_within_budget[packed-dtype2]",
    "test_outputs_states_and_gradients_stay_within_budget[padded-dtype2]",
    "test_a_backward_in_slabs_is_within_budget[True]",
    "test_the_gradient_of_the_skip_beside_transforms_is_rounded_once[300-0-300]",
    "test_many_rows_or_channels_fill_several_programs[1-3-70]",
    "test_nothing_crosses_a_boundary_even_nan[16-dtype1]",
    "test_packed_sequences_are_within_budget[kind0-ends5]",
    "test_several_chunks_stay_within_budget[dtype1]",
    "test_tokens_as_they_come_stay_within_their_budget[17-5-17-2]",
    "test_semiseparable_kernels.py::test_the_custom_operators_pass_opcheck[absent0-ends1]",
    "test_semiseparable_kernels.py::test_the_custom_operators_pass_opcheck[absent1-None]",
    "test_semiseparable_kernels.py::test_every_width_is_within_budget[256-16-dtype10]",
    "test_semiseparable_kernels.py::test_every_width_is_within_budget[256-32-dtype11]",
    "test_semiseparable_kernels.py::test_every_width_is_within_budget[256-256-dtype12]",
    "test_tokens_as_they_come_may_be_a_slice",
    "test_two_directions_are_rounded_once[16-1]",
    "test_what_stood_in_memory_does_not_matter[True-16]",
    "test_ssd_block_kernels.py::test_the_layer_is_within_budget[plain]",
    "test_ssd_block_kernels.py::test_the_layer_is_within_budget[groups]",
    "test_ssd_block_kernels.py::test_the_layer_is_within_budget[norm first]",
    "test_ssd_block_kernels.py::test_packed_sequences_are_within_budget[learnt states]",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.nodeid.endswith(LONG):
                item.add_marker(pytest.mark.skip(reason="takes long in the interpreter; needs a CUDA device"))


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

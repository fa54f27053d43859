"""The SSD layer against recorded outputs of Mamba-2 layers: values, gradients, states and decode steps."""

from __future__ import annotations

import itertools

import pytest
import torch
import zoo
from torch import Tensor

from golden import GoldenCase, load_case
from sequence_mixer import SequenceMixer
from zoo_ssd.mixer import SsdState

CASES = [
    "mamba2",
    "mamba2_d_ssm",
    "mamba2_groups2",
    "mamba2_no_rmsnorm_bias",
    "mamba2_packed",
    "mamba2_simple_init_states",
    "tf_mamba2",
]
STEPPED = [name for name in CASES if name not in ("mamba2_packed", "mamba2_simple_init_states")]
FLOAT64 = 1e-10


def built(case: GoldenCase, dtype: torch.dtype = torch.float64) -> SequenceMixer:
    weights = {name: weight.to(dtype) for name, weight in case.parameters().items()}
    return zoo.from_reference("ssd", case.sidecar["peer"]["object"], case.config, weights)


def boundaries(case: GoldenCase) -> Tensor | None:
    """`cu_seqlens` of the case, from the index of the sequence that each token belongs to."""
    index = case.tensors.get("in.seq_idx")
    if index is None:
        return None
    lengths = torch.unique_consecutive(index[0], return_counts=True)[1]
    return torch.tensor([0, *itertools.accumulate(lengths.tolist())])


def error(ours: Tensor, recorded: Tensor) -> float:
    """Relative root mean square error."""
    return float((ours.detach().double() - recorded).square().mean().sqrt() / recorded.square().mean().sqrt())


def allowed(case: GoldenCase, tensor: str, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return FLOAT64
    measured = [family.get(tensor, 0.0) for family in case.tolerance.values() if isinstance(family, dict)]
    return max(5e-6, 10 * max(value for value in measured if isinstance(value, float)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_recorded(name: str, backend: str, dtype: torch.dtype) -> None:
    case = load_case(name)
    mixer = built(case, dtype)
    mixer.backend = backend
    x = case.tensors["x"].to(dtype).requires_grad_()
    y = mixer(x, cu_seqlens=boundaries(case))
    assert error(y, case.tensors["y"]) < allowed(case, "y", dtype)
    (y * case.tensors["w"].to(dtype)).sum().backward()
    assert x.grad is not None
    assert error(x.grad, case.tensors["grad_x"]) < allowed(case, "grad_x", dtype)
    recorded = {key.removeprefix("grad."): value for key, value in case.tensors.items() if key.startswith("grad.")}
    assert set(recorded) == {key for key, _ in mixer.named_parameters()}
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None
        assert error(parameter.grad, recorded[key]) < allowed(case, f"grad.{key}", dtype), key


@pytest.mark.parametrize("name", STEPPED)
def test_states_and_decode_steps_are_those_recorded(name: str) -> None:
    case = load_case(name)
    mixer, x = built(case), case.tensors["x"]
    with torch.no_grad():
        _, prefilled = mixer.extend(x, mixer.initial_state(x.shape[0]))
        state, steps = mixer.initial_state(x.shape[0]), []
        for token in x.split(1, dim=1):
            y, state = mixer.extend(token, state, donate=True)
            steps.append(y)
    assert error(torch.cat(steps, dim=1), case.tensors["y_step"]) < FLOAT64
    conv = case.tensors["final_conv_state"][..., 1:]  # the record keeps one input more than the convolution needs
    for reached in (prefilled, state):
        assert isinstance(reached, SsdState)
        assert error(reached.ssm, case.tensors["final_state"]) < FLOAT64
        assert error(reached.conv, conv) < FLOAT64

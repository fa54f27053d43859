"""Operators that overwrite a state with one token, held to the definition of their scan with T = 1."""

from typing import Any

import pytest
import torch
import zoo.ops

from sequence_mixer.conformance.budget import judge
from sequence_mixer.errors import BackendError, DeviceError, DtypeError, MixerError, ShapeError, StateError
from sequence_mixer.shapes import accumulation_dtype
from steps import STEPS, Step, lti_attention, ssd

PLAIN = ("chunked", "reference")
MIXERS: dict[str, dict[str, Any]] = {
    "ssd": {"d_model": 32, "head_dim": 8, "d_state": 8},
    "mamba": {"d_model": 16, "d_state": 4},
    "s4d": {"d_model": 8, "d_state": 8},
    "h3": {"d_model": 8, "d_state": 8},
    "linear_attention": {"d_model": 8, "n_heads": 2},
}
STEP_OF = {
    "ssd": "ssd_step",
    "mamba": "selective_scan_step",
    "s4d": "lti_scan_step",
    "h3": "lti_attention_step",
    "linear_attention": "linear_attention_step",
}


def check(case: Step, backend: str, dtype: torch.dtype) -> None:
    """y and the state after are those of the scan, and the state is where it was."""
    want_y, want_state = case.expected()
    held = case.state.dtype if case.name == "short_convolution_step" else accumulation_dtype(dtype)
    state = case.state.to(held)
    place = state.data_ptr()
    y = case.run(backend, state)
    assert y.dtype == dtype
    assert y.shape == want_y.shape
    assert state.data_ptr() == place
    for what, got, want, at in (("y", y, want_y, dtype), ("state", state, want_state, state.dtype)):
        verdict = judge(got, want, None, at)
        assert verdict.ok, f"{what}: {verdict}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_scan_of_one_token(name: str, backend: str, dtype: torch.dtype) -> None:
    check(STEPS[name](dtype), backend, dtype)


@pytest.mark.parametrize("backend", PLAIN)
def test_heads_of_several_channels_attend(backend: str) -> None:
    check(lti_attention(torch.float32, P=3), backend, torch.float32)


@pytest.mark.parametrize("name", STEPS)
def test_a_state_of_any_strides_is_overwritten(name: str) -> None:
    case = STEPS[name](torch.float32)
    _, want = case.expected()
    wide = torch.full((*case.state.shape[:-1], 2 * case.state.shape[-1]), 7.0)
    state = wide[..., ::2]
    state.copy_(case.state)
    case.run("auto", state)
    torch.testing.assert_close(state, want.float(), rtol=1e-5, atol=1e-5)
    assert bool((wide[..., 1::2] == 7.0).all())


@pytest.mark.parametrize(
    "name", ["ssd", "selective_scan", "lti_scan", "lti_attention", "linear_attention", "short_convolution"]
)
def test_what_a_step_cannot_do_is_said(name: str) -> None:
    case = STEPS[name](torch.float32)
    argument = next(iter(case.arguments))
    with pytest.raises(BackendError, match=r"no gradient.*torch\.no_grad\(\)"):
        case.run("auto", case.state, **{argument: case.arguments[argument].clone().requires_grad_()})
    with torch.no_grad():
        case.run("auto", case.state.clone(), **{argument: case.arguments[argument].clone().requires_grad_()})
    with pytest.raises(DtypeError, match=r"state is torch\.float64, wanted torch\.float32"):
        case.run("auto", case.state.double())
    with pytest.raises(StateError, match="share memory"):
        case.run("auto", case.state[:1].expand_as(case.state))
    with pytest.raises(ShapeError, match="state has shape"):
        case.run("auto", case.state[:-1])
    with pytest.raises(DeviceError, match="state is on meta"):
        case.run("auto", case.state.to("meta"))
    with pytest.raises(BackendError, match="has no backend 'chunkt'; did you mean chunked"):
        case.run("chunkt", case.state)
    with pytest.raises(BackendError, match="runs on cuda, the input is on cpu"):
        case.run("triton", case.state)


def test_an_empty_limit_is_refused() -> None:
    case = ssd(torch.float32)
    with pytest.raises(MixerError, match="smallest <= largest"):
        case.run("auto", case.state, dt_limit=(1.0, 0.5))


@pytest.mark.parametrize(
    "name", ["ssd", "selective_scan", "lti_scan", "lti_attention", "linear_attention", "short_convolution"]
)
def test_a_compiled_step_is_the_same(name: str) -> None:
    torch.compiler.reset()
    case = STEPS[name](torch.float32)
    compiled = torch.compile(lambda state: case.run("auto", state), backend="aot_eager", fullgraph=True)
    here, there = case.state.clone(), case.state.clone()
    torch.testing.assert_close(compiled(there), case.run("auto", here), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_moves_a_donated_state_by_its_step(name: str) -> None:
    mixer = zoo.create(name, **MIXERS[name])
    x = torch.randn(2, 6, mixer.config.d_model)
    with torch.no_grad():
        _, state = mixer.extend(x[:, :5], mixer.initial_state(2))
        want, after = mixer.extend(x[:, 5:], state)
        places = {leaf: part.data_ptr() for leaf, part in state.leaves().items()}
        with zoo.ops.record_dispatch() as record:
            got, moved = mixer.extend(x[:, 5:], state, donate=True)
    assert STEP_OF[name] in [entry.op for entry in record]
    assert {leaf: part.data_ptr() for leaf, part in moved.leaves().items()} == places
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for leaf, part in moved.leaves().items():
        torch.testing.assert_close(part, after.leaves()[leaf], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_keeps_states_that_are_not_donated_or_need_gradients(name: str) -> None:
    mixer = zoo.create(name, **MIXERS[name])
    x = torch.randn(2, 6, mixer.config.d_model)
    with zoo.ops.record_dispatch() as record:
        with torch.no_grad():
            _, state = mixer.extend(x[:, :5], mixer.initial_state(2))
            before = {leaf: part.clone() for leaf, part in state.leaves().items()}
            mixer.extend(x[:, 5:], state)
        y, _ = mixer.extend(x[:, 5:], state, donate=True)
        y.sum().backward()
    assert STEP_OF[name] not in [entry.op for entry in record]
    for leaf, part in state.leaves().items():
        torch.testing.assert_close(part, before[leaf], rtol=0, atol=0)

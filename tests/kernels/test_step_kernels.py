"""Kernels that overwrite a state with one token, held to the definition of their scan with T = 1."""

import pytest
import torch
import zoo.ops

from sequence_mixer.conformance.budget import judge
from steps import STEPS, Step, linear_attention, lti_scan, selective_scan, short_convolution, ssd


def check(case: Step, dtype: torch.dtype, device: str) -> None:
    """y and the state after are those of the scan as exactly as the plain path's, and the state is where it was."""
    want_y, want_state = case.expected()
    plain_state = case.state.clone()
    plain_y = case.run("chunked", plain_state)
    moved = case.to(device)
    state = moved.state.clone()
    place = state.data_ptr()
    with zoo.ops.record_dispatch() as record:
        y = moved.run("triton", state)
    assert [(entry.op, entry.backend) for entry in record] == [(case.name, "triton")]
    assert y.dtype == dtype
    assert y.shape == want_y.shape
    assert state.data_ptr() == place
    for what, got, want, plain, at in (
        ("y", y, want_y, plain_y, dtype),
        ("state", state, want_state, plain_state, state.dtype),
    ):
        verdict = judge(got, want, plain, at)
        assert verdict.ok, f"{what}: {verdict}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STEPS)
def test_a_kernel_step_is_the_scan_of_one_token(name: str, dtype: torch.dtype, device: str) -> None:
    check(STEPS[name](dtype), dtype, device)


def test_states_wider_than_a_tile_are_split(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.ops.linear_attention.kernels import step as sums
    from zoo.ops.lti.kernels import step as modes
    from zoo.ops.selective_scan.kernels import step as selective
    from zoo.ops.short_convolution.kernels import step as taps
    from zoo.ops.ssd.kernels import step as heads

    for module in (modes, selective, heads, sums, taps):
        monkeypatch.setattr(module, "TILE", 16)
    for make in (ssd, selective_scan, lti_scan, linear_attention, short_convolution):
        check(make(torch.float32), torch.float32, device)


@pytest.mark.parametrize("name", STEPS)
def test_a_state_and_inputs_of_any_strides_are_served(name: str, device: str) -> None:
    case = STEPS[name](torch.float32).to(device)
    want = case.state.clone()
    want_y = case.run("chunked", want)
    spread = {key: part.repeat_interleave(2, -1)[..., ::2] for key, part in case.arguments.items()}
    wide = torch.full((*case.state.shape[:-1], 2 * case.state.shape[-1]), 7.0, device=device)
    state = wide[..., ::2]
    state.copy_(case.state)
    y = case.run("triton", state, **spread)
    torch.testing.assert_close(y, want_y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, want, rtol=1e-4, atol=1e-5)
    assert bool((wide[..., 1::2] == 7.0).all())


@pytest.mark.parametrize(
    "name", ["ssd", "selective_scan", "lti_scan", "lti_attention", "linear_attention", "short_convolution"]
)
def test_the_custom_operators_are_well_formed(name: str, device: str) -> None:
    """Schema, fake and functionalisation agree with what the kernel does."""
    torch.compiler.reset()
    case = STEPS[name](torch.float32).to(device)
    compiled = torch.compile(lambda state: case.run("triton", state), backend="aot_eager", fullgraph=True)
    here, there = case.state.clone(), case.state.clone()
    torch.testing.assert_close(compiled(there), case.run("triton", here), rtol=0, atol=0)
    torch.testing.assert_close(there, here, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_captured_in_a_cuda_graph(name: str) -> None:
    case = STEPS[name](torch.float32).to("cuda")
    want = case.state.clone()
    for _ in range(3):
        want_y = case.run("triton", want)
    state = case.state.clone()
    case.run("triton", state)
    state.copy_(case.state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.run("triton", state)
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(y, want_y, rtol=0, atol=0)
    torch.testing.assert_close(state, want, rtol=0, atol=0)


@pytest.mark.parametrize(("channels", "width"), [(5, 4), (70, 33), (3, 1)])
def test_taps_of_a_shift_system_are_sums_over_its_lags(channels: int, width: int, device: str) -> None:
    from zoo.ops.short_convolution.shift import shift_taps

    B, C = (torch.randn(channels, width, device=device) for _ in range(2))
    skip = torch.randn(channels, device=device)
    taps = shift_taps(B, C, skip)
    for lag in range(width):
        want = (B[:, : width - lag].double() * C[:, lag:].double()).sum(1) + (skip if lag == 0 else 0.0)
        torch.testing.assert_close(taps[:, width - 1 - lag], want.float(), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(shift_taps, (B, C, skip))

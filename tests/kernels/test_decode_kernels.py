"""Layers that decode by kernels: a donated state moves as one that is kept does."""

from typing import Any

import pytest
import torch
import zoo
import zoo.ops

S4D: dict[str, Any] = {"d_model": 6, "d_state": 10}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ssd", {"d_model": 32, "head_dim": 8, "d_state": 8}),
    ("mamba", {"d_model": 16, "d_state": 4}),
    ("s4d", S4D),
    ("s4d", {**S4D, "disc": "bilinear", "dt_transform": "softplus", "real_transform": "softplus", "tie_dt": False}),
    ("s4d", {**S4D, "n_ssm": 2, "bandlimit": 0.02, "imag_transform": "softplus", "use_b": False}),
    ("s4d", {**S4D, "real_transform": "sigmoid", "imag_transform": "exp", "dt_max": 1e-3, "dt_min": 1e-6}),
    ("s4d", {**S4D, "real_transform": "relu", "disc": "zoh", "dt_transform": "relu"}),
    ("h3", {"d_model": 6, "d_state": 10}),
    ("h3", {"d_model": 6, "d_state": 10, "disc": "zoh", "n_ssm": 2, "real_transform": "softplus", "d_conv": 3}),
    ("h3", {"d_model": 6, "d_state": 4, "real_transform": "none", "init": "real"}),
    ("h3", {"d_model": 6, "d_state": 4, "head_dim": 2}),
    ("linear_attention", {"d_model": 8, "n_heads": 2}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_donated_state_moves_as_a_kept_one(name: str, options: dict[str, Any], device: str) -> None:
    mixer = zoo.create(name, **options).to(device)
    with torch.no_grad():  # B, C and turns that are not what they start from
        for key, parameter in mixer.named_parameters():
            if key in ("B", "C", "A_imag"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(3, 4, mixer.config.d_model, device=device)
    with torch.no_grad():
        mixer.backend = "chunked"
        want, after = mixer.extend(x, mixer.initial_state(3))
        mixer.backend = "triton"
        state = mixer.initial_state(3)
        outputs = []
        for token in x.split(1, dim=1):
            y, state = mixer.extend(token, state, donate=True)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=2e-5, atol=2e-5)
    for leaf, part in state.leaves().items():
        torch.testing.assert_close(part, after.leaves()[leaf], rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_decode_step_is_captured_in_a_cuda_graph(name: str, options: dict[str, Any]) -> None:
    mixer = zoo.create(name, **options).to("cuda")
    x = torch.randn(3, 4, mixer.config.d_model, device="cuda")
    with torch.no_grad():
        want, _ = mixer.extend(x, mixer.initial_state(3))
        mixer.extend(x[:, :1], mixer.initial_state(3), donate=True)  # compiles
        state, token = mixer.initial_state(3), x[:, :1].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = mixer.extend(token, state, donate=True)
        outputs = []
        for part in x.split(1, dim=1):
            token.copy_(part)
            graph.replay()
            outputs.append(y.clone())
    torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=2e-4, atol=2e-4)

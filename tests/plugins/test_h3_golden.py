"""The H3 layer against recorded layers of HazyResearch/H3: values, gradients, kernels, states, decode steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden import GoldenCase, load_case
from layers import FLOAT64, extend_in_pieces, recorded_allowance, recorded_error
from sequence_mixer.conformance.budget import relative_rms
from sequence_mixer.errors import ReferenceMismatch
from zoo_h3 import zoo_register_mixers
from zoo_h3.from_reference import NAMES, from_reference, head_order
from zoo_h3.mixer import H3Mixer
from zoo_h3.ssm import discretize, shift_taps, transform

DEFINITION = zoo_register_mixers()[0]
BACKENDS = ["chunked", "fft", "reference"]
RECORDED = ["h3", "h3_head4", "h3_n64_short"]


def recorded(case: GoldenCase, dtype: torch.dtype = torch.float64, **changes: Any) -> H3Mixer:
    config, weights = from_reference("H3", {**case.config, **changes}, case.parameters())
    mixer = DEFINITION.make(config)
    mixer.load_state_dict(weights)
    assert isinstance(mixer, H3Mixer)
    return mixer.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_layers_come_back(name: str, backend: str, dtype: torch.dtype) -> None:
    case = load_case(name)
    mixer = recorded(case, dtype)
    mixer.backend = backend
    x = case.tensors["x"].to(dtype).requires_grad_()
    y = mixer(x)
    assert relative_rms(y, case.tensors["y"]) < recorded_allowance(case, "y", dtype)
    (y * case.tensors["w"].to(dtype)).sum().backward()
    assert x.grad is not None
    found = {name: parameter.grad for name, parameter in mixer.named_parameters()}
    order = head_order(mixer.config)
    ours = {theirs: found[name] for theirs, name in NAMES.items()}
    ours |= {"ssm_k_kernel.kernel.C": found["shift_C"], "kernel.kernel.C": found["C"]}
    ours["output_linear.weight"] = found["out_proj.weight"][:, order.argsort()]  # type: ignore[index]
    for kind in ("weight", "bias"):
        parts = found[f"in_proj.{kind}"].chunk(3)  # type: ignore[union-attr]
        ours |= {f"{part}_proj.{kind}": gradient for part, gradient in zip("qkv", parts, strict=True)}
    assert set(ours) == set(case.parameters())
    for theirs, gradient in [*ours.items(), ("x", x.grad)]:
        key = "grad_x" if theirs == "x" else f"grad.{theirs}"
        assert gradient is not None
        value = gradient.reshape(case.tensors[key].shape)
        assert recorded_error(case, key, value) < recorded_allowance(case, key, dtype), key


def test_the_head_order_of_the_fused_kernel_needs_no_permutation() -> None:
    case = load_case("h3_head4")
    mixer, x = recorded(case, use_fast_fftconv=True), case.tensors["x"].requires_grad_()
    y = mixer(x)
    assert relative_rms(y, case.tensors["y_hd_order"]) < FLOAT64
    (gradient,) = torch.autograd.grad((y * case.tensors["w"]).sum(), x)
    assert relative_rms(gradient, case.tensors["grad_x_hd_order"]) < FLOAT64


@torch.no_grad()
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_kernels_steps_and_states_come_back(name: str) -> None:
    case = load_case(name)
    mixer, x = recorded(case), case.tensors["x"]
    taps = shift_taps(mixer.shift_B, mixer.shift_C, torch.zeros_like(mixer.shift_D))
    length = case.tensors["K_shift"].shape[1]
    assert relative_rms(F.pad(taps, (0, length))[:, :length], case.tensors["K_shift"]) < FLOAT64
    log_a, c = (torch.view_as_complex(part) for part in mixer.modes())
    lags = torch.arange(length)[:, None, None]
    kernel = 2 * (c * (lags * log_a).exp()).sum(-1).real.T
    assert relative_rms(kernel, case.tensors["K_diag"]) < FLOAT64
    steps, state = extend_in_pieces(mixer, x, [1] * x.shape[1])
    assert relative_rms(steps, case.tensors.get("y_step", case.tensors["y"])) < FLOAT64  # no recorded steps: P > 1
    if "final_state" in case.tensors:
        bbar = factor_of(mixer)  # theirs holds the discretised input
        ours = torch.view_as_complex(state.ssm.movedim(3, -1).contiguous())[..., 0, 0]  # [B,H,M]
        assert relative_rms(torch.view_as_real(ours * bbar), case.tensors["final_state"]) < FLOAT64
        theirs = case.tensors["final_state_k"]  # sum_m B_m k_{t-i+m}: a convolution of our register with B
        inputs = mixer.in_proj(x).chunk(3, -1)[1].transpose(1, 2)  # keys [B,D,T]
        newest = inputs.flip(-1)[..., : theirs.shape[-1]]
        newest = F.pad(newest, (0, theirs.shape[-1] - newest.shape[-1]))
        made = torch.stack(
            [(mixer.shift_B[:, : i + 1].flip(1) * newest[..., : i + 1]).sum(-1) for i in range(theirs.shape[-1])], -1
        )
        assert relative_rms(made, theirs) < FLOAT64
        width = state.shift.shape[-1]
        assert relative_rms(state.shift.flip(-1), newest[..., :width]) < FLOAT64


def factor_of(mixer: H3Mixer) -> Tensor:
    """B Bbar / B of every head, complex [H,M]."""
    step = mixer.log_dt.double().exp().unsqueeze(1)
    rate = transform(mixer.A_real, mixer.config.real_transform)
    _, factor = discretize(rate, mixer.A_imag, step, mixer.config.disc)
    return torch.view_as_complex(factor) * torch.view_as_complex(mixer.B)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kernel": {"mode": "ema"}}, "mode='ema' is not reproduced"),
        ({"kernel": {"disc": "dss"}}, "disc='dss' is not reproduced"),
        ({"channels": 2}, "channels=2 is not reproduced"),
        ({"bandlimit": 0.5}, "bandlimit=0.5 is not reproduced"),
        ({"force_real": True}, "force_real=True is not reproduced"),
        ({"d_stat": 8}, "argument 'd_stat' is not known; did you mean d_state"),
        ({"kernel": 3}, "'kernel' is int"),
        ({"head_dim": 3}, "not a multiple of head_dim=3"),
    ],
)
def test_an_option_of_the_reference_that_is_not_reproduced_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ReferenceMismatch, match=told):
        from_reference("H3", {"d_model": 16, **changes}, {})
    with pytest.raises(ReferenceMismatch, match="H3"):
        from_reference("H4", {"d_model": 16}, {})
    with pytest.raises(ReferenceMismatch, match="missing: ssm_k_D"):
        from_reference("H3", {"d_model": 16}, {})


@pytest.mark.parametrize(
    ("measure", "ours"), [("diag", "inv+lin"), ("diag-inverse", "inv"), ("diag-hippo", "legs"), ("fout", "lin")]
)
def test_initial_modes_of_the_reference_are_read_where_we_have_them(measure: str, ours: str) -> None:
    case = load_case("h3_n64_short")
    assert recorded(case, measure=measure, n_ssm=None).config.init == ours

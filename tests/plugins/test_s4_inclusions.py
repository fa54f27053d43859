"""What S4 and S4D are special or limiting cases of, and how precise their kernels are over many tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from zoo.ops.lti import lti_scan
from zoo.ops.selective_scan import selective_scan

from layers import EXACT, tokens
from sequence_mixer.conformance.budget import relative_rms
from zoo_s4.config import S4Config, S4dConfig
from zoo_s4.diagonal import growth
from zoo_s4.dplr import Dplr, discretise, dplr_kernel
from zoo_s4.s4 import S4Mixer
from zoo_s4.s4d import S4dMixer

FLOAT32 = 1e-5  # relative RMS of a kernel, or an output, of 16,384 tokens
LONG = 16384


def test_s4_without_its_correction_is_bilinear_s4d() -> None:
    s4d = S4dMixer(S4dConfig(d_model=16, d_state=8, init="lin", disc="bilinear", n_ssm=4)).double()
    s4 = S4Mixer(S4Config(d_model=16, d_state=8, init="lin", n_ssm=4, kernel_length=32)).double()
    with torch.no_grad():
        s4.load_state_dict(s4d.state_dict() | {"P": torch.zeros_like(s4.P)})
        s4.C.copy_(s4.scaled_readout())
        x = tokens(2, 50, 16)
        for backend in ("fft", "chunked", "reference"):
            s4.backend = s4d.backend = backend
            torch.testing.assert_close(s4(x), s4d(x), **EXACT)
        s4.backend = s4d.backend = "auto"
        ours, theirs = (mixer.extend(x, mixer.initial_state(2))[1].ssm for mixer in (s4, s4d))
        step = discretise(s4._dplr())
        torch.testing.assert_close(
            ours, torch.view_as_real(step.feed * torch.view_as_complex(theirs.contiguous())), **EXACT
        )


def test_s4d_is_a_mamba_without_selection() -> None:
    """Real modes: the selective scan with the same time step, B and C at every token, and Mamba's Euler step for B."""
    mixer = S4dMixer(S4dConfig(d_model=6, d_state=5, init="real", real=True, activation="none", output="none")).double()
    x = tokens(2, 37, 6)
    dt, a = mixer._systems()
    step = dt.squeeze(1).expand(2, 37, 6)
    weight = growth(dt * a).real  # zero-order hold over Euler: B' = dt B (e^z - 1) / z
    constant = lambda part: part.expand(2, 37, 6, 5)
    y, state = selective_scan(
        x, step, a.real, constant(mixer.B[0] * weight), constant(2.0 * mixer.C[0]), D=mixer.D[0], backend="reference"
    )
    torch.testing.assert_close(mixer(x), y, **EXACT)
    _, after = mixer.extend(x, mixer.initial_state(2))
    torch.testing.assert_close(after.ssm * mixer.B[0] * weight * dt, state, **EXACT)


def test_complex_modes_are_pairs_of_states_that_turn() -> None:
    """lti_scan with N/2 complex modes is the real recurrence of N/2 damped rotations."""
    log_a = torch.stack([-torch.rand(3, 4) * 0.3, 2 * torch.randn(3, 4)], -1).double()
    c, x = torch.randn(3, 4, 2).double(), tokens(1, 25, 3)
    size, angle = log_a[..., 0].exp(), log_a[..., 1]
    re, im, outputs = torch.zeros(3, 4).double(), torch.zeros(3, 4).double(), []
    for token in x[0]:
        turned = size * (angle.cos() * re - angle.sin() * im) + token.unsqueeze(1)
        re, im = turned, size * (angle.sin() * re + angle.cos() * im)
        outputs.append(2 * (c[..., 0] * re - c[..., 1] * im).sum(1))
    torch.testing.assert_close(lti_scan(x, log_a, c)[0][0], torch.stack(outputs), **EXACT)


def slow_system() -> Dplr:
    """LegS of N = 64 at the largest time step, one channel of it with modes that hardly decay."""
    from zoo_s4.parameters import initial_system

    legs = initial_system("legs", 64, 1)
    a = legs.a.unsqueeze(0).repeat(3, 1)
    a[1] = torch.complex(torch.full((32,), -1e-4).double(), a[1].imag)
    dt = torch.tensor([[0.001], [0.1], [0.1]]).double()
    P = legs.P.unsqueeze(1).repeat(1, 3, 1)
    P[:, 1] *= 0.01
    return Dplr(dt, a, P, legs.B.unsqueeze(0).repeat(3, 1))


def stepped(system: Dplr, C: Tensor, length: int) -> Tensor:
    """Taps by the recurrence in float64, [K,D,length]."""
    step = discretise(system)
    state, taps = step.feed, []
    for _ in range(length):
        taps.append(2 * (C * state).real.sum(-1))
        state = step.turn * state - (step.out * (step.into * state).real.sum(-1, keepdim=True)).sum(0)
    return torch.stack(taps, -1)


@pytest.mark.slow
@torch.no_grad()
def test_the_kernel_of_s4_is_exact_over_sixteen_thousand_tokens() -> None:
    from zoo_s4.dplr import dense, scaled

    system, C = slow_system(), torch.randn(1, 3, 32, dtype=torch.complex128)
    exact = stepped(system, C, LONG)
    A, _ = dense(discretise(system))
    kernel = dplr_kernel(system, scaled(C, A, LONG), LONG)
    for channel in range(3):  # each by itself: a slow channel is large, and would hide the others
        assert relative_rms(kernel[:, channel], exact[:, channel]) < 1e-9
    doubled = S4Mixer(S4Config(d_model=3, d_state=64, kernel_length=1024)).double()
    with torch.no_grad():
        doubled.inv_dt.copy_(system.dt.log())
        doubled.A_real.copy_((-system.a.real).log())
        doubled.A_imag.copy_(-system.a.imag)
        doubled.P.copy_(torch.view_as_real(system.P))
        doubled.B.copy_(torch.view_as_real(system.B).unsqueeze(0))
        doubled.C.copy_(torch.view_as_real(C))
        doubled.C.copy_(doubled.scaled_readout())
    grown = doubled.kernel(LONG)
    for channel in range(3):
        assert relative_rms(grown[:, channel], exact[:, channel]) < 1e-8


@pytest.mark.parametrize("name", ["s4", "s4d"])
@torch.no_grad()
def test_float32_layers_are_precise_over_sixteen_thousand_tokens(name: str) -> None:
    """float32 parameters and inputs against the same in float64: kernels and outputs, slow modes included."""
    torch.manual_seed(1)
    if name == "s4":
        narrow, wide = (S4Mixer(S4Config(d_model=4, d_state=64, kernel_length=LONG)) for _ in range(2))
    else:
        narrow, wide = (S4dMixer(S4dConfig(d_model=4, d_state=64)) for _ in range(2))  # type: ignore[assignment]
    narrow.A_real[0] = math.log(1e-4)  # hardly decays
    narrow.inv_dt[0] = math.log(0.1)
    if isinstance(narrow, S4Mixer):
        narrow.P[:, 0] *= 0.01
    wide = wide.double()
    wide.load_state_dict(narrow.state_dict())
    x = tokens(1, LONG, 4).float()
    exact_kernel, exact = wide.kernel(LONG), wide(x.double())
    kernel = narrow.kernel(LONG).float()
    for channel in range(4):
        assert relative_rms(kernel[:, channel], exact_kernel[:, channel]) < FLOAT32
    for backend in ("fft", "chunked"):
        narrow.backend = backend
        assert relative_rms(narrow(x), exact) < FLOAT32, backend


@torch.no_grad()
def test_decoding_in_float32_keeps_slow_modes() -> None:
    """2,000 tokens one by one against the float64 kernel: a factor near 1, rounded, would have drifted by 1e-4."""
    torch.manual_seed(2)
    mixer = S4Mixer(S4Config(d_model=4, d_state=8, dt_min=0.001, dt_max=0.001, kernel_length=2048))
    x = 1.0 + 0.1 * tokens(1, 2000, 4)
    wide = S4Mixer(mixer.config).double()
    wide.load_state_dict(mixer.state_dict())
    exact, state, outputs = wide(x), mixer.initial_state(1), []
    for token in x.float().split(1, 1):
        y, state = mixer.extend(token, state, donate=True)
        outputs.append(y)
    assert relative_rms(torch.cat(outputs, 1), exact) < FLOAT32

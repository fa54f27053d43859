"""HiPPO matrices and their diagonal plus low-rank forms, and how the numbers of a state space layer are drawn."""

from __future__ import annotations

import math

import pytest
import torch

from zoo_s4.config import DIAGONALS, MEASURES, TRANSFORMS, S4Config, S4dConfig
from zoo_s4.diagonal import discretise, growth
from zoo_s4.hippo import correction, initial_system, normal_plus_low_rank, transition
from zoo_s4.parameters import initial_dt, initial_systems, parameter_of, positive
from zoo_s4.s4 import S4Mixer
from zoo_s4.s4d import S4dMixer


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("width", [4, 16, 64])
def test_a_measure_plus_its_correction_is_normal(measure: str, width: int) -> None:
    A, _ = transition(measure, width)
    P = correction(measure, width, 3)
    normal = A + P.mT @ P
    diagonal = normal.diagonal().mean() * torch.eye(width).double()
    torch.testing.assert_close(normal + normal.mT, 2 * diagonal, rtol=0, atol=1e-12 * width**2)
    assert int(torch.linalg.matrix_rank(P)) == MEASURES[measure]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("width", [4, 16, 64])
def test_the_low_rank_form_is_the_measure_in_another_basis(measure: str, width: int) -> None:
    """Its impulse response is that of the dense matrix, for the readout that B itself is."""
    A, B = transition(measure, width)
    P = correction(measure, width, 2)
    made = normal_plus_low_rank(measure, width, 2)
    assert made.a.shape == made.B.shape == (width // 2,)
    assert bool((made.a.real <= 1e-12).all())
    assert bool((made.a.imag <= 0).all())
    whole = torch.diag(torch.cat([made.a, made.a.conj()])) - torch.cat([made.P, made.P.conj()], 1).mT @ torch.cat(
        [made.P.conj(), made.P], 1
    )
    inputs = torch.cat([made.B, made.B.conj()])
    for time in (0.01, 0.1, 0.5):
        dense = B @ torch.linalg.matrix_exp(time * A) @ B
        rotated = inputs.conj() @ torch.linalg.matrix_exp(time * whole) @ inputs
        assert abs(complex(rotated) - float(dense)) < 1e-9 * float(B @ B), time
        low = P @ torch.linalg.matrix_exp(time * A) @ P.mT
        found = torch.cat([made.P, made.P.conj()], 1).conj() @ torch.linalg.matrix_exp(time * whole)
        found = found @ torch.cat([made.P, made.P.conj()], 1).mT
        torch.testing.assert_close(found.real, low, rtol=0, atol=1e-9 * width)


def test_legs_has_half_the_identity_and_known_entries() -> None:
    A, B = transition("legs", 4)
    root = [math.sqrt(2 * n + 1) for n in range(4)]
    wanted = [[-(n + 1) if n == k else -root[n] * root[k] if n > k else 0.0 for k in range(4)] for n in range(4)]
    torch.testing.assert_close(A, torch.tensor(wanted).double())
    torch.testing.assert_close(B, torch.tensor(root).double())
    made = normal_plus_low_rank("legs", 64, 1)
    torch.testing.assert_close(made.a.real, torch.full((32,), -0.5).double())
    torch.testing.assert_close(made.B.imag, torch.zeros(32).double(), rtol=0, atol=1e-12)


def test_legt_is_refused_below_rank_two() -> None:
    with pytest.raises(ValueError, match="'legt' needs rank 2, got 1"):
        normal_plus_low_rank("legt", 8, 1)
    with pytest.raises(ValueError, match="no initial system 'legz'"):
        initial_system("legz", 8, 1)


def test_diagonals_are_those_of_their_formulas() -> None:
    width, n = 16, torch.arange(8).double()
    imag = {
        "lin": math.pi * n,
        "inv": width / math.pi * (width / (2 * n + 1) - 1),
        "inv2": width / math.pi * (width / (n + 1) - 1),
        "quad": (1 + 2 * n) ** 2 / math.pi,
        "real": 0 * n,
    }
    for name, wanted in imag.items():
        made = initial_system(name, width, 1)
        torch.testing.assert_close(-made.a.imag, wanted)
        torch.testing.assert_close(-made.a.real, n + 1 if name == "real" else torch.full_like(n, 0.5))
        assert bool((made.B == 1).all())
    assert set(imag) | {"rand"} == set(DIAGONALS)
    assert bool((initial_system("rand", width, 1).a.imag < 0).all())


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_and_their_inverses_meet(transform: str) -> None:
    value = torch.tensor([2e-4, 1e-3, 0.1, 0.5, 0.9]).double()
    parameter = parameter_of(value, transform)
    torch.testing.assert_close(positive(parameter, transform), value, rtol=1e-9, atol=1e-6)
    assert bool(parameter_of(torch.zeros(1).double(), transform).isfinite())
    assert float(positive(parameter_of(torch.zeros(1).double(), transform), transform)) == pytest.approx(1e-4, rel=1.1)


def test_time_steps_fill_their_range() -> None:
    for transform in ("exp", "softplus"):
        config = S4dConfig(d_model=4096, d_state=2, dt_min=0.01, dt_max=0.2, dt_transform=transform)
        steps = positive(initial_dt(config), transform)
        assert steps.shape == (4096, 1)
        assert 0.00999 < float(steps.min()) < 0.0102
        assert 0.196 < float(steps.max()) < 0.2002
        assert abs(float(steps.log().mean()) - 0.5 * math.log(0.01 * 0.2)) < 0.05
    assert initial_dt(S4Config(d_model=4, d_state=6, tie_dt=False)).shape == (4, 3)


def test_several_systems_share_the_copies_equally() -> None:
    config = S4Config(d_model=12, d_state=8, init="legs+lin+rand", n_ssm=6, rank=2)
    made = initial_systems(config, 8, 2)
    assert made.a.shape == (6, 4)
    assert made.P.shape == (2, 6, 4)
    assert bool((made.a[0] == made.a[1]).all())
    assert bool((made.a[2].imag == -math.pi * torch.arange(4).double()).all())
    assert bool((made.a[4] != made.a[5]).any())


def test_initial_values_have_the_scales_of_the_reference() -> None:
    mixer = S4dMixer(S4dConfig(d_model=512, d_state=64))
    assert float(mixer.C.detach().square().sum(-1).mean()) == pytest.approx(1.0, abs=0.05)
    assert float(mixer.D.detach().std()) == pytest.approx(1.0, abs=0.1)
    assert mixer.A_real.shape == mixer.A_imag.shape == (512, 32)
    assert mixer.B.shape == (1, 512, 32, 2)
    tied = S4Mixer(S4Config(d_model=64, d_state=16, n_ssm=1, kernel_length=64))
    assert tied.A_real.shape == (1, 8)
    assert tied.P.shape == (1, 1, 8, 2)
    assert tied.C.shape == (1, 64, 8, 2)


def test_zero_order_hold_keeps_its_digits_at_small_steps() -> None:
    """(e^z - 1) / z from 1e-12 to 1, against its series, gradient included."""
    sizes = torch.logspace(-12, 0, 49).double()
    z = torch.polar(sizes, torch.linspace(1.6, 4.6, 49).double()).requires_grad_()
    found = growth(z)
    terms = [z.detach() ** k / math.factorial(k + 1) for k in range(18)]
    torch.testing.assert_close(found.detach(), torch.stack(terms).sum(0), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found, z, torch.ones_like(found))
    slopes = [k * z.detach() ** (k - 1) / math.factorial(k + 1) for k in range(1, 18)]
    torch.testing.assert_close(gradient, torch.stack(slopes).sum(0).conj(), rtol=1e-8, atol=0)


def test_the_bilinear_factor_may_be_zero() -> None:
    """dt a = -2 has no logarithm; its powers and their gradients are those of the factor all the same."""
    dt, a = torch.ones(1, 1).double(), torch.full((1, 1), -2.0, dtype=torch.complex128).requires_grad_()
    log_a, weight = discretise(dt, a, torch.ones_like(a.detach()), "bilinear")
    taps = (log_a.unsqueeze(-1) * torch.arange(4)).exp().squeeze() * weight.squeeze()
    torch.testing.assert_close(taps.detach().real, torch.tensor([0.5, 0.0, 0.0, 0.0]).double())
    (slope,) = torch.autograd.grad(taps[1].real, a)
    assert complex(slope) == pytest.approx(0.125)  # d/da of (1 + a/2) / (1 - a/2)^2 at -2

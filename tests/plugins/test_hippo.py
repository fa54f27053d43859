"""HiPPO matrices and their diagonal plus low-rank forms, and how the numbers of a state space layer are drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sequence_mixer.errors import ReferenceMismatch
from zoo_s4.config import DIAGONALS, MEASURES, TRANSFORMS, S4Config, S4dConfig
from zoo_s4.diagonal import discretise, growth
from zoo_s4.dplr import Dplr, dense, dplr_kernel, lengthened, scaled
from zoo_s4.dplr import discretise as discretise_dplr
from zoo_s4.from_reference import convert_s4, convert_s4d
from zoo_s4.hippo import BETA, correction, normal_plus_low_rank, rescaling, tied_form, transition
from zoo_s4.initial_diagonal import Draw, initial_diagonal
from zoo_s4.parameters import LEAST, initial_dt, initial_system, initial_systems, parameter_of, positive
from zoo_s4.s4 import S4Mixer
from zoo_s4.s4d import S4dMixer

UNDAMPED = ("legt", "lmu", "lagt", "fout", "fourier2", "fourier_decay")  # all their damping is in P
DAMPING = {"legs": 0.5, "legsd": 0.5, "tlagt": 0.5, "glagt": 0.005, "foud": 0.5} | dict.fromkeys(UNDAMPED, 0.0)
LAGUERRE = [("lagt", 0.0, 0.7), ("tlagt", 0.0, 0.3), ("glagt", 0.6, 0.2), ("glagt", -0.7, 1.5)]
FORMS = [(measure, 0.0, None) for measure in MEASURES] + LAGUERRE


def tied(measure: str, width: int, alpha: float, beta: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """A and B of a measure in the basis where its correction makes it normal, and the scales of that basis."""
    A, B = transition(measure, width, alpha=alpha, beta=beta)
    scale = rescaling(measure, width, alpha=alpha)
    return scale.unsqueeze(1) * A / scale, scale * B, scale


@pytest.mark.parametrize(("measure", "alpha", "beta"), FORMS)
@pytest.mark.parametrize("width", [2, 4, 16, 64])
def test_a_measure_plus_its_correction_is_normal(measure: str, alpha: float, beta: float | None, width: int) -> None:
    A, _, _ = tied(measure, width, alpha, beta)
    P = correction(measure, width, 3)
    normal = A + P.mT @ P
    diagonal = normal.diagonal().mean() * torch.eye(width).double()
    torch.testing.assert_close(normal + normal.mT, 2 * diagonal, rtol=0, atol=1e-12 * width**2)
    largest = float(torch.linalg.matrix_norm(normal, 2)) ** 2
    torch.testing.assert_close(normal @ normal.mT, normal.mT @ normal, rtol=0, atol=1e-13 * largest + 1e-12)
    assert int(torch.linalg.matrix_rank(P)) == MEASURES[measure]
    if beta is None:
        assert -float(diagonal[0, 0]) == pytest.approx(DAMPING[measure], abs=1e-12 * width)


@pytest.mark.parametrize("measure", [measure for measure, rank in MEASURES.items() if rank])
def test_a_correction_of_lower_rank_does_not_make_a_measure_normal(measure: str) -> None:
    """The ranks are the least: what A's symmetric part has beside a multiple of the identity."""
    A, _, _ = tied(measure, 16, 0.0, None)
    symmetric = A + A.mT + 2 * DAMPING[measure] * torch.eye(16).double()
    assert int(torch.linalg.matrix_rank(symmetric, atol=1e-8)) == MEASURES[measure]
    with pytest.raises(ValueError, match=f"needs rank {MEASURES[measure]}, got {MEASURES[measure] - 1}"):
        correction(measure, 16, MEASURES[measure] - 1)


@pytest.mark.parametrize(("measure", "alpha", "beta"), FORMS)
@pytest.mark.parametrize("width", [2, 4, 16, 64])
def test_the_tied_form_gives_the_measure_back(measure: str, alpha: float, beta: float | None, width: int) -> None:
    """V diag(a) V^* and its conjugate are A + P^T P, V is unitary, and B and P are those of the measure."""
    A, B, _ = tied(measure, width, alpha, beta)
    P = correction(measure, width, 2)
    made, V = tied_form(measure, width, 2, alpha=alpha, beta=beta)
    whole = torch.cat([V, V.conj()], 1)
    torch.testing.assert_close(whole.mH @ whole, torch.eye(width).to(V), rtol=0, atol=1e-12 * width)
    back = 2 * (V @ torch.diag(made.a) @ V.mH).real - (P.mT @ P)
    torch.testing.assert_close(back, A, rtol=0, atol=1e-14 * float(made.a.abs().max()) * width + 1e-13)
    largest = float(A.abs().max()) * width
    torch.testing.assert_close(2 * (V @ made.B).real, B, rtol=0, atol=1e-14 * largest + 1e-13)
    torch.testing.assert_close(2 * (V @ made.P.mT).real.mT, P, rtol=0, atol=1e-14 * largest + 1e-13)
    assert made.a.shape == made.B.shape == (width // 2,)
    assert bool((made.a.real <= 0).all())
    assert bool((made.a.imag <= 0).all())
    assert float(made.B.imag.abs().max()) < 1e-10


@pytest.mark.parametrize(("measure", "alpha", "beta"), FORMS)
def test_spectra_lie_on_the_left(measure: str, alpha: float, beta: float | None) -> None:
    """Of A itself: nothing grows. Triangular ones have what their diagonals say, real numbers."""
    A, _ = transition(measure, 16, alpha=alpha, beta=beta)
    assert float(torch.linalg.eigvals(A).real.max()) < 1e-9
    if measure in ("legs", *BETA):
        assert bool((A.triu(1) == 0).all())
        tilt = {"tlagt": (0.5, 0.5), "glagt": (0.5, 0.5), "lagt": (0.5, 0.0)}.get(measure)
        weight = 0.0 if measure == "legs" else BETA[measure] if beta is None else beta
        wanted = (
            torch.arange(1, 17).double() if tilt is None else torch.full((16,), tilt[0] + tilt[1] * weight).double()
        )
        torch.testing.assert_close(-A.diagonal(), wanted)


@pytest.mark.parametrize(("measure", "alpha", "beta"), FORMS)
@pytest.mark.parametrize(("width", "length"), [(4, 33), (64, 256)])
def test_the_kernel_is_that_of_the_dense_matrices(
    measure: str, alpha: float, beta: float | None, width: int, length: int
) -> None:
    """C A'^l B' of A and B as they are defined, bilinear and dense, for a random readout in the measure's own basis.

    Where a itself has no damping, a layer gives it LEAST, and both sides have that here.
    """
    torch.manual_seed(0)
    A, B = transition(measure, width, alpha=alpha, beta=beta)
    scale = rescaling(measure, width, alpha=alpha)
    C, dt = torch.randn(width).double() * scale, torch.full((1, 1), 0.01, dtype=torch.float64)
    made, V = tied_form(measure, width, MEASURES[measure] or 1, alpha=alpha, beta=beta)
    damping = LEAST if measure in UNDAMPED else 0.0
    A = A - damping * torch.eye(width).double()
    system = Dplr(dt, made.a.unsqueeze(0) - damping, made.P.unsqueeze(1), made.B.unsqueeze(0))
    ours = ((C / scale).to(V) @ V).reshape(1, 1, -1)
    matrix, _ = dense(discretise_dplr(system))
    found = dplr_kernel(system, scaled(ours, matrix, length), length, "chunked")[0, 0]
    left = torch.eye(width).double() - 0.005 * A
    step, state = torch.linalg.solve(left, torch.eye(width).double() + 0.005 * A), torch.linalg.solve(left, 0.01 * B)
    taps = []
    for _ in range(length):
        taps.append(C @ state)
        state = step @ state
    exact = torch.stack(taps)
    assert float((found - exact).norm() / exact.norm()) < 1e-11
    longer, scale_of = lengthened(scaled(ours, matrix, length // 3), matrix, length // 3, length)
    again = dplr_kernel(system, longer, scale_of, "chunked")[0, 0, :length]
    assert float((again - exact).norm() / exact.norm()) < 1e-11


def test_measures_of_one_family_are_each_other() -> None:
    """LMU is LegT at twice the speed, fourier2 is fout so, glagt with alpha = 0 is tlagt, and legsd is legs undone."""
    for fast, slow in (("lmu", "legt"), ("fourier2", "fout")):
        A, B, _ = tied(fast, 8, 0.0, None)
        half, halved = transition(slow, 8)
        torch.testing.assert_close(A, 2 * half)
        torch.testing.assert_close(B, 2 * halved)
    A, B = transition("glagt", 8, beta=0.25)
    tilted, _ = transition("tlagt", 8, beta=0.25)
    torch.testing.assert_close(A, tilted)
    torch.testing.assert_close(B, torch.full((8,), 0.5).double())
    A, B = transition("legs", 8)
    P = correction("legs", 8, 1)
    torch.testing.assert_close(transition("legsd", 8)[0], A + P.mT @ P)
    torch.testing.assert_close(transition("legsd", 8)[1], B / 2)
    faded, fed = transition("fourier_decay", 8)
    rotation, B = transition("fout", 8)
    torch.testing.assert_close(faded, rotation + torch.outer(B, B) / 2)
    torch.testing.assert_close(fed, B / 2)


def test_known_entries_of_the_other_measures() -> None:
    A, B = transition("lmu", 3)
    assert A.tolist() == [[-1, -1, -1], [3, -3, -3], [-5, 5, -5]]
    assert B.tolist() == [1, -3, 5]
    A, B = transition("tlagt", 3, beta=0.5)
    assert A.tolist() == [[-0.75, 0, 0], [-1, -0.75, 0], [-1, -1, -0.75]]
    assert B.tolist() == [0.5, 0.5, 0.5]
    A, B = transition("foud", 4)
    turn = 2 * math.pi
    wanted = [[-0.5, 0, 0, 0], [0, -0.5, 0, 0], [0, 0, -0.5, -turn], [0, 0, turn, -0.5]]
    torch.testing.assert_close(A, torch.tensor(wanted).double())
    torch.testing.assert_close(B, torch.tensor([1, 0, math.sqrt(2), 0]).double())
    A, B = transition(
        "glagt", 3, alpha=0.5, beta=1.0
    )  # norms^2 Gamma(n + 3/2) / n!: g, 3/2 g, 15/8 g with g = Gamma(3/2)
    below = [[-1, 0, 0], [-((1 / 1.5) ** 0.5), -1, 0], [-((1 / 1.875) ** 0.5), -((1.5 / 1.875) ** 0.5), -1]]
    torch.testing.assert_close(A, torch.tensor(below).double())
    fed = math.gamma(0.5) ** -0.5 * math.gamma(1.5) ** -0.5
    wanted_B = [fed, fed * 1.5 / 1.5**0.5, fed * 1.875 / 1.875**0.5]
    torch.testing.assert_close(B, torch.tensor(wanted_B).double())


def test_numbers_that_a_measure_does_not_have_are_refused() -> None:
    for measure, given, said in (
        ("legz", {}, "no measure 'legz'"),
        ("legs", {"beta": 0.1}, "beta=0.1 with the measure 'legs'"),
        ("tlagt", {"beta": -1.0}, "wanted one above 0"),
        ("tlagt", {"alpha": 0.1}, "alpha=0.1 with the measure 'tlagt'"),
        ("glagt", {"alpha": 1.0}, "between -1 and 1"),
    ):
        with pytest.raises(ValueError, match=said):
            transition(measure, 4, **given)


def test_legs_has_half_the_identity_and_known_entries() -> None:
    A, B = transition("legs", 4)
    root = [math.sqrt(2 * n + 1) for n in range(4)]
    wanted = [[-(n + 1) if n == k else -root[n] * root[k] if n > k else 0.0 for k in range(4)] for n in range(4)]
    torch.testing.assert_close(A, torch.tensor(wanted).double())
    torch.testing.assert_close(B, torch.tensor(root).double())
    made = normal_plus_low_rank("legs", 64, 1)
    torch.testing.assert_close(made.a.real, torch.full((32,), -0.5).double())
    torch.testing.assert_close(made.B.imag, torch.zeros(32).double(), rtol=0, atol=1e-12)


def test_diagonals_are_varied_as_asked() -> None:
    torch.manual_seed(0)
    width, n = 32, torch.arange(16).double()
    made = initial_diagonal("lin", width, 2, Draw(real_scale=3.0, imag_scale=0.5, b_scale=2.0, p_scale=0.0))
    torch.testing.assert_close(made.a, torch.complex(torch.full_like(n, -1.5), -0.5 * math.pi * n))
    assert bool((made.B == 2).all())
    assert made.P.shape == (2, 16)
    assert bool((made.P == 0).all())
    drawn = initial_diagonal("quad", width, 1, Draw(real_random=True, imag_random=True, b_init="random"))
    pair = ((-drawn.a.imag * math.pi).sqrt() - 1) / 2
    assert bool(((pair >= 0) & (pair <= 16) & (drawn.a.real > -1) & (drawn.a.real <= 0)).all())
    assert len(set(drawn.a.real.tolist())) == len(set(pair.tolist())) == len(set(drawn.B.tolist())) == 16
    assert float(pair.max()) > 10
    slow = initial_diagonal("real", width, 1, Draw(real_random=True))
    assert bool(((slow.a.real <= 0) & (slow.a.real >= -16) & (slow.a.imag == 0)).all())
    assert float(slow.a.real.min()) < -8
    for _ in range(50):
        assert bool((initial_diagonal("inv", 4, 1, Draw(imag_random=True)).a.imag <= 0).all())
    turned = torch.polar(torch.ones_like(n), 2 * math.pi / width * n)
    for kind, wanted in (("unit-ccw", turned), ("unit-cw", turned.conj()), ("alternating", (-1.0) ** n + 0j)):
        torch.testing.assert_close(initial_diagonal("lin", width, 1, Draw(b_init=kind)).B, wanted)


def test_normalised_kernels_sum_to_numbers_of_variance_one() -> None:
    made = initial_diagonal("lin", 16, 1, Draw(b_init="random", b_scale=7.0, normalize=True))
    C = torch.randn(200_000, 8, dtype=torch.complex128)
    sums = 2 * (C * (-made.B / made.a)).sum(1).real  # of a whole kernel, 2 Re C B e^(a t) over time
    assert float(sums.square().mean()) == pytest.approx(1.0, rel=0.03)


def test_a_config_varies_its_diagonals_and_not_its_measures() -> None:
    config = S4Config(d_model=6, d_state=8, init="legs+lin", n_ssm=2, rank=2, imag_scale=2.0, p_scale=0.0, b_scale=3.0)
    made, plain = initial_systems(config, 8, 2), normal_plus_low_rank("legs", 8, 2)
    for found, wanted in ((made.a[0], plain.a), (made.P[:, 0], plain.P), (made.B[0], plain.B)):
        assert torch.equal(found, wanted)
    torch.testing.assert_close(made.a[1].imag, -2 * math.pi * torch.arange(4).double())
    assert bool((made.P[:, 1] == 0).all())
    assert bool((made.B[1] == 3).all())
    mixer = S4Mixer(config)
    torch.testing.assert_close(
        mixer.A_imag[1].double(), 2 * math.pi * torch.arange(4).double().clamp(min=LEAST / (2 * math.pi))
    )


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (S4Config, {"init": "lmu"}, "'lmu' needs rank=2, got 1"),
        (S4Config, {"init": "legs", "p_scale": 0.0}, "p_scale=0.0 would have no effect on init='legs'"),
        (S4Config, {"init": "legs+fout", "normalize": True}, "normalize=True would have no effect"),
        (S4dConfig, {"init": "real", "imag_scale": 2.0}, "imag_scale=2.0 would have no effect on init='real'"),
        (S4dConfig, {"init": "rand+real", "imag_random": True}, "it shapes lin, inv, inv2, quad"),
        (S4dConfig, {"init": "lin", "use_b": False, "b_scale": 2.0}, "b_scale would have no effect with use_b=False"),
        (S4dConfig, {"init": "real", "real": True, "b_init": "unit-cw"}, "b_init='unit-cw' turns"),
        (S4dConfig, {"init": "lin", "b_init": "hippo"}, "b_init"),
        (S4dConfig, {"init": "lin", "p_scale": 0.5}, "p_scale"),
    ],
)
def test_variations_without_an_effect_are_refused(kind: type, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        kind(d_model=64, **given)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        *[(name, name) for name in MEASURES],
        ("fourier", "fout"),
        ("fourier_diag", "foud"),
        ("hippo", "legs+fout"),
        ("all", "legs+fout+inv+lin"),
        ("diag", "inv+lin"),
        ("dplr", "legs"),
        ("diag-hippo", "legs"),
        ("dplr-quadratic", "quad"),
        ("diag-random", "rand"),
        (["legs", "legsd", "diag-real", "foud"], "legs+legsd+real+foud"),
    ],
)
def test_systems_of_the_reference_have_our_names(theirs: str | list[str], ours: str) -> None:
    given = {"d_model": 4, "d_state": 4, "n_ssm": 4, "rank": 2, "final_act": None, "mode": "dplr", "init": theirs}
    peer = S4Mixer(S4Config(d_model=4, d_state=4, rank=2, output="none", kernel_length=8))
    weights = {f"layer.{'' if key == 'D' else 'kernel.'}{key}": part for key, part in peer.state_dict().items()}
    weights["layer.kernel.l_kernel"] = torch.tensor(8)
    config, converted = convert_s4("S4Block(mode='dplr')", given, weights)
    assert config.init == ours
    bare = "diag" in str(theirs) or theirs == "all"  # the peer's diagonals then have no P
    assert config.p_scale == (0.0 if bare and set(ours.split("+")) & set(DIAGONALS) else 1.0)
    S4Mixer(config).load_state_dict(converted)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ("random", "init='random' is not reproduced: a dense normal matrix"),
        (["legs", "diagonal"], "init='diagonal' is not reproduced: N unlike real modes"),
        ("chebt", "initial system"),
    ],
)
def test_systems_that_have_no_tied_form_are_refused(theirs: str | list[str], said: str) -> None:
    for convert, mode in ((convert_s4, "dplr"), (convert_s4d, "diag")):
        with pytest.raises(ReferenceMismatch, match=said):
            convert(f"S4Block(mode='{mode}')", {"d_model": 4, "mode": mode, "init": theirs}, {})


@pytest.mark.parametrize("measure", MEASURES)
def test_s4d_begins_with_the_diagonal_part_of_a_measure(measure: str) -> None:
    mixer, made = S4dMixer(S4dConfig(d_model=2, d_state=16, init=measure)), normal_plus_low_rank(measure, 16, 2)
    torch.testing.assert_close(mixer.A_real[0].double().exp(), -made.a.real.clamp(max=-LEAST))
    torch.testing.assert_close(mixer.A_imag[0].double(), -made.a.imag.clamp(max=-LEAST))
    torch.testing.assert_close(mixer.B[0, 0, :, 0].double(), made.B.real)


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

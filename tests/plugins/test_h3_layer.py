"""The H3 layer against its own equations, recorded layers, and what the contract asks of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.lti.triton_path import MOST_MODES
from zoo.ops.lti_attention.triton_path import WIDEST
from zoo.ops.short_convolution import MAX_LOOPED_WIDTH

from layers import (
    EXACT,
    PADS,
    agree,
    build,
    extend_in_pieces,
    padded,
    tokens,
    with_gradients,
)
from sequence_mixer import State
from sequence_mixer.conformance.budget import relative_rms
from sequence_mixer.errors import LengthError, StateError
from zoo_h3 import EXAMPLES, zoo_register_mixers
from zoo_h3.config import INITS, KERNEL_MODES, KERNEL_TAPS, KERNEL_WIDEST, H3Config, capabilities_of
from zoo_h3.mixer import H3Mixer
from zoo_h3.reference import h3_layer_reference
from zoo_h3.ssm import discretize, inverse_transform, legs_frequencies, shift_taps, transform

DEFINITION = zoo_register_mixers()[0]
BACKENDS = ["chunked", "fft", "reference"]
SMALL = ["default", "heads", "limited"]


def layer(example: str = "default", backend: str = "auto") -> H3Mixer:
    mixer = build(DEFINITION, example)
    assert isinstance(mixer, H3Mixer)
    mixer.backend = backend
    return mixer


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_layer_equals_its_equations(example: str) -> None:
    mixer, x, cotangent = layer(example), tokens(2, 70).requires_grad_(), tokens(2, 70)
    wanted, _ = h3_layer_reference(mixer.config, dict(mixer.named_parameters()), x)
    truth = with_gradients(mixer, wanted, x, cotangent=cotangent)
    for backend in BACKENDS:
        mixer.backend = backend
        agree(with_gradients(mixer, mixer(x), x, cotangent=cotangent), truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[1] * 12, [5, 1, 6], [12]], ids=str)
@pytest.mark.parametrize("example", SMALL)
def test_extending_in_pieces_equals_the_whole(example: str, sizes: list[int], backend: str) -> None:
    mixer, x, cotangent = layer(example, backend), tokens(2, 12).requires_grad_(), tokens(2, 12)
    pieces, state = extend_in_pieces(mixer, x, sizes)
    agree(
        with_gradients(mixer, pieces, x, cotangent=cotangent), with_gradients(mixer, mixer(x), x, cotangent=cotangent)
    )
    _, whole = mixer.extend(x, mixer.initial_state(2))
    agree([state.shift, state.ssm], [whole.shift, whole.ssm])


def test_old_states_stay_valid_and_donated_ones_are_reused() -> None:
    mixer, x = layer("heads"), tokens(2, 9)
    with torch.no_grad():
        _, state = mixer.extend(x[:, :5], mixer.initial_state(2))
        kept = state.map(torch.clone)
        y, after = mixer.extend(x[:, 5:], state)
        assert torch.equal(state.ssm, kept.ssm)
        assert torch.equal(state.shift, kept.shift)
        given, donated = mixer.extend(x[:, 5:], state, donate=True)
    assert torch.equal(y, given)
    assert torch.equal(after.ssm, donated.ssm)
    assert donated.ssm.data_ptr() == state.ssm.data_ptr()
    leaf = kept.map(lambda part: part.requires_grad_())
    y, _ = mixer.extend(x[:, 5:], leaf)
    for gradient in torch.autograd.grad(y.square().sum(), [leaf.shift, leaf.ssm]):
        assert bool((gradient != 0).any())


@pytest.mark.parametrize("example", SMALL)
def test_packed_sequences_do_not_meet_and_extend_their_own_rows(example: str) -> None:
    mixer, lengths = layer(example), [3, 0, 70, 1, 0]
    pieces = [tokens(1, length).requires_grad_() for length in lengths]
    cu, cotangent = torch.tensor([0, 3, 3, 73, 74, 74], dtype=torch.int32), tokens(1, 74)
    start = mixer.extend(tokens(5, 4), mixer.initial_state(5))[1].detach()
    y, after = mixer.extend(torch.cat(pieces, 1), start, cu_seqlens=cu)
    alone = [mixer.extend(piece, start.index_select(torch.tensor([s]))) for s, piece in enumerate(pieces)]
    agree(
        with_gradients(mixer, y, *pieces, cotangent=cotangent),
        with_gradients(mixer, torch.cat([part for part, _ in alone], 1), *pieces, cotangent=cotangent),
    )
    agree([after.shift, after.ssm], [torch.cat([s.shift for _, s in alone]), torch.cat([s.ssm for _, s in alone])])


@pytest.mark.parametrize("example", SMALL)
def test_padding_changes_nothing_and_comes_out_as_zero(example: str) -> None:
    mixer = layer(example)
    rows = [tokens(1, 12 - left - right)[0].requires_grad_() for left, right in PADS]
    x, mask = padded(rows, PADS)
    y = mixer(x, padding_mask=mask)
    assert bool((y[~mask] == 0).all())
    wanted = torch.cat([mixer(row[None])[0] for row in rows])
    cotangent = tokens(1, wanted.shape[0])[0]
    agree(
        with_gradients(mixer, y[mask], *rows, cotangent=cotangent),
        with_gradients(mixer, wanted, *rows, cotangent=cotangent),
    )


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_matrix_form_is_the_layer_under_a_toeplitz_mask(example: str) -> None:
    mixer, x = layer(example), tokens(2, 40)
    form = mixer.matrix_form(x)
    torch.testing.assert_close(form.apply(), mixer(x), **EXACT)
    factors = form.factors
    assert factors is not None
    assert factors.skip is not None
    matrix = form.matrix
    torch.testing.assert_close(form.heads(slice(1, 2)), matrix[:, 1:2], **EXACT)
    mask = factors.mask(slice(None))
    torch.testing.assert_close(mask[..., 1:, 1:], mask[..., :-1, :-1], **EXACT)
    assert bool((mask.triu(1) == 0).all())
    scores = torch.einsum("bthp,bshp->bhts", factors.left, factors.right)
    torch.testing.assert_close(matrix, mask * scores + torch.diag_embed(factors.skip.transpose(1, 2)), **EXACT)
    rank = mixer.config.head_dim * mixer.config.d_state
    singular = torch.linalg.svdvals(matrix[..., 20:, :20])
    assert bool((singular[..., rank:] <= 1e-10 * singular[..., :1]).all())


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_cost_is_what_torch_counts(example: str) -> None:
    mixer, length = layer(example).float(), 128
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(tokens(2, length).float())
    cost = mixer.cost(2, length, torch.float32)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert cost.parameters == sum(parameter.numel() for parameter in mixer.parameters())
    assert cost.state_elements == sum(leaf.numel() for leaf in mixer.initial_state(2).leaves().values())
    assert cost.bytes == 4 * (cost.parameters + 2 * 2 * length * 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("example", ["default", "heads"])
def test_states_keep_their_precision_in_low_precision_layers(example: str, dtype: torch.dtype) -> None:
    mixer, x = layer(example).to(dtype), tokens(2, 70).to(dtype)
    exact = layer(example)
    exact.load_state_dict({name: value.double() for name, value in mixer.state_dict().items()})
    y, state = mixer.extend(x, mixer.initial_state(2))
    assert (y.dtype, state.shift.dtype, state.ssm.dtype) == (dtype, dtype, torch.float32)
    y, state = mixer.extend(x, state)
    assert relative_rms(y, exact(torch.cat([x, x], 1).double())[:, 70:]) < 8 * torch.finfo(dtype).eps


def test_the_layer_remembers_slow_modes_over_thousands_of_tokens() -> None:
    mixer = DEFINITION.make(H3Config(d_model=64, d_state=4, dt_min=1e-4, dt_max=1e-3, d_conv=2))
    exact = DEFINITION.make(mixer.config).double()
    exact.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 4000, 64)
    with torch.no_grad():
        assert relative_rms(mixer(x), exact(x.double())) < 2e-6


def test_initial_values_are_the_reference_implementations() -> None:
    mixer = DEFINITION.make(H3Config(d_model=1024, d_state=16))
    assert isinstance(mixer, H3Mixer)
    steps = mixer.log_dt.exp()
    assert 0.001 <= steps.min() < 0.0012
    assert 0.08 < steps.max() <= 0.1
    torch.testing.assert_close(mixer.A_real.exp(), torch.full((1024, 8), 0.5))
    torch.testing.assert_close(mixer.A_imag[3], math.pi * torch.arange(8).float())
    assert torch.equal(mixer.B[..., 0], torch.ones(1024, 8))
    assert not mixer.B[..., 1].any()
    assert mixer.C.square().sum(-1).mean().item() == pytest.approx(1.0, abs=0.1)
    assert torch.equal(mixer.shift_B, F.pad(torch.ones(1024, 1), (0, 15)))
    assert 0.24 < mixer.shift_C.abs().max() <= 0.25
    for skip in (mixer.D, mixer.shift_D):
        assert skip.std().item() == pytest.approx(1.0, abs=0.1)


def test_every_family_of_modes_has_its_formula() -> None:
    n = torch.arange(4).double()
    formulas = {
        "lin": math.pi * n,
        "inv": 8 / math.pi * (8 / (2 * n + 1) - 1),
        "inv2": 8 / math.pi * (8 / (n + 1) - 1),
        "quad": (2 * n + 1) ** 2 / math.pi,
        "legs": legs_frequencies(8),
        "real": 0 * n,
    }
    mixer = DEFINITION.make(H3Config(d_model=64, d_state=8, n_ssm=16, init="+".join([*formulas, "rand", "lin"])))
    assert isinstance(mixer, H3Mixer)
    for place, turn in enumerate(formulas.values()):
        torch.testing.assert_close(mixer.A_imag[2 * place + 1], turn.float())
    rates = mixer.A_real.exp()
    torch.testing.assert_close(rates[10:12], torch.arange(1.0, 5.0).expand(2, -1))
    torch.testing.assert_close(rates[:10], torch.full((10, 4), 0.5))
    assert mixer.A_imag[12].std() > 0.1
    assert set(formulas) | {"rand"} == set(INITS)


def test_the_frequencies_of_legs_are_those_of_the_matrix() -> None:
    root = (2 * torch.arange(8).double() + 1).sqrt()
    A = -(torch.outer(root, root).tril(-1) + torch.diag(torch.arange(1, 9).double()))
    values = torch.linalg.eigvals(A + 0.5 * torch.outer(root, root))
    torch.testing.assert_close(values.real, torch.full((8,), -0.5).double())
    torch.testing.assert_close(values.imag.sort().values[:4], legs_frequencies(8))


@pytest.mark.parametrize("kind", ["exp", "softplus", "sigmoid", "relu", "none"])
def test_transforms_come_back_from_their_inverse(kind: str) -> None:
    rate = torch.tensor([1e-3, 0.5, 0.9]).double()
    torch.testing.assert_close(transform(inverse_transform(rate, kind), kind), rate, rtol=0, atol=1.1e-4)


def test_discretisation_stays_finite_where_its_formulas_do_not() -> None:
    rate = torch.tensor([[0.0, 2.0, 2.0, 1e-9]]).double().requires_grad_()
    turn = torch.tensor([[0.0, 0.0, 1e-3, 1e-9]]).double().requires_grad_()
    step = torch.ones(1, 1).double()
    for kind in ("zoh", "bilinear"):
        log_a, factor = discretize(rate, turn, step, kind)
        assert bool(log_a.isfinite().all() & factor.isfinite().all())
        for gradient in torch.autograd.grad(log_a.exp().sum() + factor.sum(), [rate, turn]):
            assert bool(gradient.isfinite().all())
    _, factor = discretize(rate, turn, step, "zoh")
    torch.testing.assert_close(factor[0, 0], torch.tensor([1.0, 0.0]).double())
    torch.testing.assert_close(factor[0, 3], torch.tensor([1.0, 0.5e-9]).double(), rtol=1e-9, atol=1e-15)


def test_the_taps_of_the_shift_ssm_are_its_impulse_response() -> None:
    B, C, D = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3)
    state, outputs = torch.zeros(3, 5), []
    for t in range(7):
        state = F.pad(state[:, :-1], (1, 0)) + B * (t == 0)
        outputs.append((C * state).sum(-1) + D * (t == 0))
    response = torch.stack(outputs, 1)
    torch.testing.assert_close(shift_taps(B, C, D), response[:, :5])
    assert not response[:, 5:].any()


def test_optimiser_hints_are_the_reference_implementations() -> None:
    groups = layer("tied").parameter_groups()
    assert groups == {
        name: {"weight_decay": 0.0, "lr_scale": 0.5} for name in ("log_dt", "A_real", "A_imag", "B", "shift_B")
    }


def test_triton_is_declared_exactly_where_its_kernels_serve() -> None:
    assert (KERNEL_WIDEST, KERNEL_MODES, KERNEL_TAPS) == (WIDEST, MOST_MODES, MAX_LOOPED_WIDTH)

    def names(**options: Any) -> list[str]:
        return [spec.name for spec in capabilities_of(H3Config(**options)).backends]

    assert names(d_model=64) == ["triton", *BACKENDS]
    assert names(d_model=512, head_dim=256) == BACKENDS
    assert names(d_model=64, d_conv=257) == BACKENDS
    assert names(d_model=64, d_state=300, d_conv=4) == BACKENDS
    assert names(d_model=64, d_state=300, d_conv=4, head_dim=2) == ["triton", *BACKENDS]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"head_dim": 48}, "d_model=64 is not a multiple of head_dim=48"),
        ({"d_state": 7}, "d_state=7 is odd"),
        ({"n_ssm": 3}, "n_ssm=3 does not divide the 64 heads"),
        ({"init": "diag-lin"}, "no init named 'diag-lin'"),
        ({"init": "lin+inv", "n_ssm": 1}, "names 2 families, which 1 SSMs do not share"),
        ({"dt_min": 0.5}, "dt_min=0.5 is above dt_max=0.1"),
        ({"disc": "dss"}, "disc"),
        ({"d_state": 16.0}, "integer"),
        ({"l_max": 16}, "Extra inputs"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused_in_words(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        H3Config.model_validate({"d_model": 64, **options})


def test_longer_inputs_and_strange_states_are_refused_in_words() -> None:
    class Strange(State):
        total: Tensor

    mixer = layer("limited")
    with pytest.raises(LengthError, match="max_length is 128"):
        mixer(tokens(1, 129))
    with pytest.raises(StateError, match=r"Strange.*H3State"):
        mixer.extend(tokens(1, 2), Strange(torch.zeros(1, 3)))


@pytest.mark.slow
def test_a_token_is_recalled_over_a_thousand_steps() -> None:
    torch.manual_seed(1)
    mixer = DEFINITION.make(H3Config(d_model=32, d_state=16, d_conv=4, bias=False))
    embed, norm, read = nn.Embedding(10, 32, padding_idx=9), nn.LayerNorm(32), nn.Linear(32, 8)
    parts = [mixer, embed, norm, read]
    optimiser = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=1e-2, weight_decay=0.0)

    def answers(count: int) -> tuple[Tensor, Tensor]:
        """Logits after a token to recall, 1,022 blanks and a cue; and that token."""
        first = torch.randint(0, 8, (count,))
        symbols = torch.full((count, 1024), 9)
        symbols[:, 0], symbols[:, -1] = first, 8
        return read(norm(mixer(embed(symbols))[:, -1])), first

    for _ in range(450):
        logits, first = answers(16)
        loss = F.cross_entropy(logits, first)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss.item() < 0.02:
            break
    with torch.no_grad():
        logits, first = answers(64)
    assert (logits.argmax(-1) == first).float().mean() > 0.95

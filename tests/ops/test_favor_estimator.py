"""FAVOR+ as an estimator: its projections are uniform, its features unbiased, its error shrinks as M^-1/2."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from zoo.ops.favor_attention import draw_projection, favor_attention
from zoo.ops.favor_attention.features import feature_count, log_features
from zoo.ops.favor_attention.projection import haar
from zoo.ops.softmax_attention import softmax_attention

from sequence_mixer.conformance.budget import rms
from sequence_mixer.errors import ConfigError

WIDTH = 8
DRAWS = 30_000


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def estimates(projection: Tensor, q: Tensor, k: Tensor, features: str) -> Tensor:
    """<phi(q), phi(k)> / exp(<q, k> / sqrt(N)) for each of many projections [draws, WIDTH, WIDTH]."""
    logs = [log_features(x.view(1, 1, 1, -1), projection.flatten(0, 1), features) for x in (q, k)]
    products = (logs[0] + logs[1]).exp().flatten()
    if features == "hyperbolic":
        by_sign = products.view(2, projection.shape[0], WIDTH).mean((0, 2))
    else:
        by_sign = products.view(projection.shape[0], WIDTH).mean(1)
    return by_sign / torch.exp(q @ k / WIDTH**0.5)


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Queries and keys in directions where a QR without signs is off."""
    ones = torch.ones(WIDTH, dtype=torch.float64) * 0.5
    first = torch.zeros(WIDTH, dtype=torch.float64)
    first[0] = 1.2
    any_q, any_k = torch.randn(2, WIDTH, generator=seeded(3), dtype=torch.float64).mul(0.7)
    return {"ones": (ones, ones), "first": (first, first), "minus first": (-first, -first), "any": (any_q, any_k)}


@pytest.mark.parametrize("features", ["positive", "hyperbolic"])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_estimate_of_the_softmax_kernel_is_unbiased(orthogonal: bool, features: str) -> None:
    generator = seeded(1)
    drawn = draw_projection(
        DRAWS * WIDTH, WIDTH, orthogonal=orthogonal, generator=generator, dtype=torch.float64
    ).view(DRAWS, WIDTH, WIDTH)  # fmt: skip
    for name, (q, k) in pairs().items():
        found = estimates(drawn, q, k, features)
        error = float(found.mean() - 1) / (float(found.std()) / DRAWS**0.5)
        assert abs(error) < 4.5, f"{name}: {float(found.mean()):.4f}, {error:.1f} standard errors off"


def test_a_decomposition_without_signs_would_be_biased() -> None:
    """The check above can fail: it does for the matrix that the JAX code and performer-pytorch draw."""
    normal = torch.randn(DRAWS, WIDTH, WIDTH, generator=seeded(1), dtype=torch.float64)
    norms = torch.randn(DRAWS, WIDTH, WIDTH, generator=seeded(2), dtype=torch.float64).norm(dim=-1, keepdim=True)
    raw, fixed = torch.linalg.qr(normal)[0] * norms, haar(normal) * norms
    q, k = pairs()["ones"]
    found, ours = estimates(raw, q, k, "positive"), estimates(fixed, q, k, "positive")
    assert abs(float(found.mean()) - 1) > 20 * float(found.std()) / DRAWS**0.5
    assert abs(float(ours.mean()) - 1) < 4.5 * float(ours.std()) / DRAWS**0.5


def test_orthogonal_rows_and_both_signs_reduce_the_variance() -> None:
    independent, orthogonal = (
        draw_projection(DRAWS * WIDTH, WIDTH, orthogonal=flag, generator=seeded(5), dtype=torch.float64).view(
            DRAWS, WIDTH, WIDTH
        )
        for flag in (False, True)
    )
    q, k = pairs()["any"]
    spread = {
        (name, features): float(estimates(drawn, q, k, features).std())
        for name, drawn in (("independent", independent), ("orthogonal", orthogonal))
        for features in ("positive", "hyperbolic")
    }
    for features in ("positive", "hyperbolic"):
        assert spread["orthogonal", features] < 0.97 * spread["independent", features], spread
    for name in ("independent", "orthogonal"):
        assert spread[name, "hyperbolic"] < 0.97 * spread[name, "positive"], spread


def test_blocks_are_orthogonal_and_rows_have_the_norms_asked_for() -> None:
    for norms in ("chi", "sqrt"):
        drawn = draw_projection(20, WIDTH, norms=norms, generator=seeded(7), dtype=torch.float64)
        assert drawn.shape == (20, WIDTH)
        for block in drawn.split(WIDTH):
            products = block @ block.mT
            assert torch.allclose(products, torch.diag(products.diagonal()), atol=1e-12)
        if norms == "sqrt":
            assert torch.allclose(drawn.norm(dim=1), torch.full((20,), math.sqrt(WIDTH), dtype=torch.float64))
    many = draw_projection(DRAWS, WIDTH, generator=seeded(8), dtype=torch.float64)
    squares = many.square().sum(1)  # chi-squared: mean P, variance 2 P
    assert abs(float(squares.mean()) - WIDTH) < 5 * (2 * WIDTH / DRAWS) ** 0.5
    assert abs(float(squares.var()) / (2 * WIDTH) - 1) < 0.06
    with pytest.raises(ConfigError, match="norms is 'one'"):
        draw_projection(3, 2, norms="one")


def test_a_projection_comes_from_its_generator_alone() -> None:
    before = torch.get_rng_state()
    one, two = (draw_projection(9, 4, generator=seeded(4)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one, draw_projection(9, 4, generator=seeded(5)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("features", ["positive", "hyperbolic"])
def test_the_error_against_softmax_attention_falls_with_the_root_of_the_features(features: str, causal: bool) -> None:
    q, k, v = (torch.randn(1, 24, 2, WIDTH, generator=seeded(n), dtype=torch.float64) for n in (1, 2, 3))
    q, k = 0.3 * q, 0.3 * k
    exact = softmax_attention(q, k, v, causal=causal)
    errors = {}
    for rows in (32, 256, 2048):
        found = []
        for draw in range(24):
            projection = draw_projection(rows, WIDTH, generator=seeded(100 + draw), dtype=torch.float64)
            y = favor_attention(q, k, v, projection, features=features, causal=causal)[0]
            found.append(rms(y - exact))
        errors[feature_count(rows, features)] = sum(each**2 for each in found) ** 0.5 / 24**0.5
    counts = sorted(errors)
    slope = math.log(errors[counts[-1]] / errors[counts[0]]) / math.log(counts[-1] / counts[0])
    assert -0.58 < slope < -0.42, errors
    assert errors[counts[-1]] < 0.03 * rms(exact)

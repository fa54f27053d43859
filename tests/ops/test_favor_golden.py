"""FAVOR+ against recorded outputs of performer-pytorch and fast-transformers: features, operators, and a leak."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo.ops.favor_attention import favor_attention
from zoo.ops.favor_attention.features import feature_count, log_features, projected, relu_features

from golden import load_case
from sequence_mixer.conformance.budget import relative_rms
from sequence_mixer.errors import ConfigError

BACKENDS = ["reference", "chunked"]


def recorded(name: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Leaves q, k, v [B,T,H,P] of a recorded operator, its projection and its cotangent."""
    case = load_case(name)
    leaves = {part: case.tensors[f"in.{part}"].transpose(1, 2).clone().requires_grad_() for part in "qkv"}
    return leaves, case.tensors["in.projection_matrix"], case.tensors["w"].transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("performer_op_softmax", {"causal": False, "compat": "jax", "feature_eps": 1e-4}),
        ("performer_op_generalized", {"causal": False, "features": "relu"}),
        ("performer_op_causal_generalized", {"features": "relu"}),
    ],
)
def test_recorded_operators_come_back(name: str, options: dict, backend: str) -> None:
    leaves, projection, w = recorded(name)
    if options.get("causal", True):  # its key sums start at 1e-6: that is a state
        options = options | {"initial_state": torch.zeros(1, 2, 32, 18, dtype=torch.float64)}
        options["initial_state"][..., -2] = 1e-6
    y, _ = favor_attention(**leaves, projection=projection, backend=backend, **options)
    found = {"y": y} | dict(zip(leaves, torch.autograd.grad((y * w).sum(), list(leaves.values())), strict=True))
    tensors = load_case(name).tensors
    wanted = {part: tensors["y" if part == "y" else f"grad.{part}"].transpose(1, 2) for part in found}
    for part, value in found.items():
        assert relative_rms(value, wanted[part]) < 1e-10, part


def test_the_recorded_causal_softmax_attention_is_ours_but_for_its_leak() -> None:
    leaves, projection, _ = recorded("performer_op_causal_softmax")
    tensors = load_case("performer_op_causal_softmax").tensors
    values, phi = leaves["v"].detach().transpose(1, 2), {}
    for part, axes in (("q", -1), ("k", (1, 3))):
        x = leaves[part].detach()
        highest = projected(x, projection, "positive").amax(axes, keepdim=True)  # of the keys: over future ones too
        phi[part] = (log_features(x, projection, "positive") - highest).exp() * 32**-0.5

    def attend(feature_eps: float, key_eps: float) -> Tensor:
        phi_q, phi_k = (phi[part] + feature_eps * 32**-0.5 for part in "qk")
        weights = torch.einsum("bthm,bshm->bhts", phi_q, phi_k).tril()
        total = weights.sum(-1, keepdim=True) + key_eps * phi_q.sum(-1).transpose(1, 2).unsqueeze(-1)
        return weights @ values / total

    for part in "qk":
        assert relative_rms((phi[part] + 1e-4 * 32**-0.5).transpose(1, 2), tensors[f"phi_{part}"]) < 1e-12
    assert relative_rms(attend(1e-4, 1e-6), tensors["y"]) < 1e-12
    ours = favor_attention(**leaves, projection=projection)[0].transpose(1, 2)
    assert relative_rms(ours, attend(0.0, 0.0)) < 1e-12  # without the epsilons the maximum cancels
    assert relative_rms(ours, tensors["y"]) > 1e-3
    with pytest.raises(ConfigError, match="future keys change past outputs"):
        favor_attention(**leaves, projection=projection, compat="jax", feature_eps=1e-4)


@pytest.mark.parametrize("part", ["query", "key", "relu", "hyperbolic"])
def test_recorded_features_come_back(part: str) -> None:
    case = load_case(f"favor_features_{part}")
    if part == "hyperbolic":
        x = case.tensors["in.x"].clone().requires_grad_()
        omega = case.tensors["in.omega"].mT
        phi = log_features(x, omega, "hyperbolic").exp() * feature_count(omega.shape[0], "hyperbolic") ** -0.5
        recorded_gradient = case.tensors["grad.x"]
    else:
        x = case.tensors["in.data"].clone().requires_grad_()
        by_head, projection = x.transpose(1, 2), case.tensors["in.projection_matrix"]
        if part == "relu":
            phi = relu_features(by_head, projection, case.config["eps"])
        else:
            dash = projected(by_head, projection, "positive").detach()
            highest = dash.amax(-1 if part == "query" else (1, 3), keepdim=True)
            log = log_features(by_head, projection, "positive")
            phi = ((log - highest).exp() + case.config["eps"]) * 44**-0.5
        phi, recorded_gradient = phi.transpose(1, 2), case.tensors["grad.data"]
    (gradient,) = torch.autograd.grad((phi * case.tensors["w"]).sum(), x)
    assert relative_rms(phi, case.tensors["y"]) < 1e-12
    assert relative_rms(gradient, recorded_gradient) < 1e-12

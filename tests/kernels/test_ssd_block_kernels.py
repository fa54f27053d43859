"""The SSD layer whose inside is one operator, against the same layer in float64, judged by its plain path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from zoo.ops.ssd.block import ssd_block

from sequence_mixer import SequenceMixer
from sequence_mixer.conformance.budget import judge

pytest.importorskip("triton")

SMALL = {"d_model": 16, "head_dim": 16, "d_state": 16, "expand": 2}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": SMALL,
    "groups": {**SMALL, "n_groups": 2},
    "norm first": {**SMALL, "norm_before_gate": True},
    "limits": {**SMALL, "dt_limit": (0.01, 0.05), "d_conv": 2, "conv_bias": False},
    "learnt states": {**SMALL, "learnable_init_states": True},
}


def layers(options: dict[str, Any], device: str) -> tuple[SequenceMixer, SequenceMixer, SequenceMixer]:
    """The same layer by kernels and by PyTorch in bfloat16, and in float64."""
    torch.manual_seed(0)
    made = [zoo.create("ssd", **options).to(device, torch.bfloat16) for _ in range(2)]
    with torch.no_grad():
        for name, parameter in made[0].named_parameters():
            if name.endswith("bias") or name in ("init_states", "D", "norm.weight"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    exact = zoo.create("ssd", **options).to(device, torch.float64)
    for other in (made[1], exact):
        other.load_state_dict(made[0].state_dict())
    made[0].backend, made[1].backend, exact.backend = "triton", "chunked", "reference"
    return made[0], made[1], exact


def outcome(mixer: SequenceMixer, x: Tensor, with_states: bool, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    """Output, states, and the gradients of x and every parameter; of the states too, if asked."""
    x = x.to(mixer.out_proj.weight.dtype).detach().requires_grad_()
    y, state = mixer.mix(x, None, cu_seqlens=cu_seqlens, padding_mask=None, donate=False)
    results = {"y": y, "conv": state.conv, "ssm": state.ssm} if with_states else {"y": y}
    seeded = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(part.shape, generator=seeded).bfloat16().to(part) for part in results.values()]
    wanted = {"x": x, **dict(mixer.named_parameters())}
    found = torch.autograd.grad(list(results.values()), list(wanted.values()), cotangents, allow_unused=True)
    gradients = {f"d{name}": g for name, g in zip(wanted, found, strict=True) if g is not None}
    return {name: part.detach() for name, part in results.items()} | gradients


def check(
    options: dict[str, Any],
    device: str,
    tokens: int,
    batch: int = 2,
    with_states: bool = False,
    ends: Tensor | None = None,
) -> None:
    ours, plain, exact = layers(options, device)
    x = torch.randn(batch, tokens, options["d_model"]).to(device, torch.bfloat16)
    assert ours._is_one_block(ours.in_proj(x))
    found, usual, truth = (outcome(mixer, x, with_states, ends) for mixer in (ours, plain, exact))
    assert found.keys() == truth.keys()
    for name, value in found.items():
        verdict = judge(value, truth[name], usual[name], torch.bfloat16)
        assert verdict.ok, f"{name}: {verdict}"


@pytest.mark.parametrize("kind", list(LAYERS))
def test_the_layer_is_within_budget(device: str, kind: str) -> None:
    check(LAYERS[kind], device, 35, batch=1 if device == "cpu" else 2)


def test_states_and_their_gradients_are_within_budget(device: str) -> None:
    check({**LAYERS["groups"], "d_model": 32}, device, 35, with_states=True)


@pytest.mark.parametrize("kind", ["plain", "learnt states"])
def test_packed_sequences_are_within_budget(device: str, kind: str) -> None:
    ends = torch.tensor([0, 0, 5, 6, 38, 40], dtype=torch.int32, device=device)
    check(LAYERS[kind], device, 40, batch=1, ends=ends)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"d_model": 256}, {"d_model": 512, "d_state": 256, "head_dim": 128}])
def test_usual_widths_are_within_budget_on_a_gpu(device: str, options: dict[str, Any]) -> None:
    if device != "cuda":
        pytest.skip("needs a CUDA device: too wide for Triton's interpreter")
    check(options, device, 1030)


def test_calls_that_one_operator_does_not_serve_go_to_three(device: str) -> None:
    x = torch.randn(1, 9, 16).to(device, torch.bfloat16)
    for options in ({"rmsnorm": False}, {"d_ssm": 16}, {"d_has_head_dim": True}, {"d_conv": 1}):
        mixer = zoo.create("ssd", **SMALL, **options).to(device, torch.bfloat16)
        mixer.backend = "triton"
        assert not mixer._is_one_block(mixer.in_proj(x)), options
        assert mixer(x).shape == x.shape
    mixer = zoo.create("ssd", **SMALL).to(device)
    assert not mixer._is_one_block(mixer.in_proj(x.float()))


def test_the_custom_operator_passes_opcheck(device: str) -> None:
    torch.manual_seed(0)
    heads, width, modes = 2, 16, 16
    channels, convolved = heads * width, heads * width + 2 * modes
    made = [
        torch.randn(1, 5, channels + convolved + heads).bfloat16(), torch.randn(convolved, 4), torch.randn(convolved),
        -torch.rand(heads), torch.randn(heads), torch.randn(heads), torch.randn(channels),
    ]  # fmt: skip
    leaves = [part.to(device).requires_grad_() for part in made]
    arguments = (*leaves, None, None, 1, modes, 0.0, float("inf"), 1e-5, channels, False)
    torch.library.opcheck(ssd_block, arguments)

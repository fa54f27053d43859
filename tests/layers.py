"""What the tests of layers share: gradients, decoding in pieces, padded and packed inputs, recorded cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import zoo
from torch import Tensor

from golden import GoldenCase
from sequence_mixer import MixerDef, SequenceMixer
from sequence_mixer.conformance.budget import relative_rms

EXACT = {"rtol": 1e-9, "atol": 1e-11}
FLOAT64 = 1e-10
PADS = [(0, 9), (4, 0), (2, 3), (9, 0)]  # padded slots on the left and on the right of each row


def build(definition: MixerDef, example: str = "default", dtype: torch.dtype = torch.float64) -> SequenceMixer:
    """The mixer of an example config, biases away from their small initial values."""
    mixer = definition.make(definition.example(example)).to(dtype)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return mixer


def tokens(batch: int, length: int, width: int = 64) -> Tensor:
    return torch.randn(batch, length, width, dtype=torch.float64)


def with_gradients(mixer: SequenceMixer, y: Tensor, *inputs: Tensor, cotangent: Tensor) -> list[Tensor]:
    """y and its gradients with respect to `inputs` and every parameter."""
    wanted = [*inputs, *mixer.parameters()]
    found = torch.autograd.grad((y * cotangent).sum(), wanted, allow_unused=True)
    return [y.detach(), *[torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]]


def agree(ours: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def extend_in_pieces(
    mixer: SequenceMixer, x: Tensor, sizes: Sequence[int], state: Any = None, **options: Any
) -> tuple[Tensor, Any]:
    """Outputs and last state of `extend` over x [B,T,D] in pieces of `sizes` tokens."""
    state = mixer.initial_state(x.shape[0], dtype=x.dtype) if state is None else state
    outputs = []
    for piece in x.split(list(sizes), 1):
        y, state = mixer.extend(piece, state, **options)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def padded(rows: Sequence[Tensor], pads: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Rows [t,D] with NaN around them, [B,T,D], and their mask bool [B,T]."""
    slots = [torch.full((row.shape[0], 1), True) for row in rows]
    spread = [
        torch.cat([row.new_full((left, row.shape[1]), torch.nan), row, row.new_full((right, row.shape[1]), torch.nan)])
        for row, (left, right) in zip(rows, pads, strict=True)
    ]
    mask = [
        torch.cat([torch.zeros(left, 1, dtype=torch.bool), slot, torch.zeros(right, 1, dtype=torch.bool)])
        for slot, (left, right) in zip(slots, pads, strict=True)
    ]
    return torch.stack(spread), torch.stack(mask).squeeze(-1)


def recorded_error(case: GoldenCase, key: str, value: Tensor) -> float:
    """Relative RMS error; the absolute one where the record says that the gradient is zero by symmetry."""
    exact = case.tensors[key]
    if key in case.sidecar.get("zero_gradients", ()):
        return float(value.double().square().mean().sqrt())
    return relative_rms(value, exact)


def recorded_allowance(case: GoldenCase, key: str, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return FLOAT64
    measured = [family.get(key, 0.0) for family in case.tolerance.values() if isinstance(family, dict)]
    return max(5e-6, 10 * max(value for value in measured if isinstance(value, float)))


def from_case(name: str, case: GoldenCase, dtype: torch.dtype) -> SequenceMixer:
    weights = {key: weight.to(dtype) for key, weight in case.parameters().items()}
    return zoo.from_reference(name, case.sidecar["peer"]["object"], case.config, weights)


def expect_recorded(
    case: GoldenCase, mixer: SequenceMixer, dtype: torch.dtype, parts: Mapping[str, tuple[str, slice]]
) -> None:
    """Outputs and gradients are those recorded. parts: their parameter -> our parameter and its rows."""
    x = case.tensors["x"].to(dtype).requires_grad_()
    mask = None
    if "in.lengths" in case.tensors:
        mask = torch.arange(x.shape[1]) < case.tensors["in.lengths"][:, None]
    y = mixer(x, padding_mask=mask)
    real = torch.ones(y.shape[:2], dtype=torch.bool) if mask is None else mask
    assert relative_rms(y[real], case.tensors["y"][real]) < recorded_allowance(case, "y", dtype)
    (y * case.tensors["w"].to(dtype))[real].sum().backward()
    assert x.grad is not None
    assert relative_rms(x.grad, case.tensors["grad_x"]) < recorded_allowance(case, "grad_x", dtype)
    ours = dict(mixer.named_parameters())
    assert set(parts) == set(case.parameters())
    for theirs, (name, rows) in parts.items():
        gradient = ours[name].grad
        assert gradient is not None
        key = f"grad.{theirs}"
        assert recorded_error(case, key, gradient[rows]) < recorded_allowance(case, key, dtype), key


def attention_layer_parts(width: int) -> dict[str, tuple[str, slice]]:
    """Projections of fast-transformers' AttentionLayer as rows of ours; width: rows of each."""
    parts = {}
    for kind in ("weight", "bias"):
        for n, part in enumerate(("query", "key", "value")):
            parts[f"{part}_projection.{kind}"] = (f"in_proj.{kind}", slice(n * width, (n + 1) * width))
        parts[f"out_projection.{kind}"] = (f"out_proj.{kind}", slice(None))
    return parts

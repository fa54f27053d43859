"""How far a result may be from the float64 reference: the one place where tolerances are made.

The allowance comes from data: the error of the plain PyTorch path at the same dtype, doubled, and never less than a
few roundings. It is the same on every machine. Nothing here is set by hand per mixer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_OVER_RMS = 20.0  # largest element error allowed, in units of the allowed RMS error, or twice that of the plain path
FLOOR_EPS = 4.0  # relative RMS floor in units of eps
FLOOR_EPS_FLOAT64 = 64.0  # the reference itself is float64, so its own rounding is in the comparison
SAME_FLOAT64 = 2.0**14 * torch.finfo(torch.float64).eps  # two orders of the same float64 sums, 3.6e-12

# Most that the plain path itself may err, as the RMS of a whole layer's output and of its median gradient: the rounding
# of float32 sums over a few hundred tokens, and of a handful of half-precision operands.
PLAIN_CEILING = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def rms(value: Tensor) -> float:
    """Root mean square over all elements, in float64; 0 for an empty tensor."""
    return float(value.detach().double().square().mean().sqrt()) if value.numel() else 0.0


def relative_rms(value: Tensor, exact: Tensor, scale: float = 0.0) -> float:
    """rms(value - exact) / max(rms(exact), scale); the absolute error where that is 0; NaN never passes."""
    error = rms(value.detach().double().cpu() - exact.detach().double().cpu())
    scale = max(rms(exact), scale)
    return error / scale if scale > 0 else error


def floor(dtype: torch.dtype) -> float:
    """Relative RMS error that any correct path may have at `dtype`."""
    return (FLOOR_EPS_FLOAT64 if dtype == torch.float64 else FLOOR_EPS) * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Verdict:
    """Error of one tensor beside what was allowed. `ok` is False for NaN."""

    ok: bool
    error: float
    allowed: float
    worst: float
    worst_allowed: float

    def __str__(self) -> str:
        return (
            f"relative RMS error {self.error:.2e} (allowed {self.allowed:.2e}), "
            f"largest {self.worst:.2e} (allowed {self.worst_allowed:.2e})"
        )


def judge(
    value: Tensor,
    exact: Tensor,
    plain: Tensor | None,
    dtype: torch.dtype,
    *,
    plain_error: float = 0.0,
    scale: float = 0.0,
) -> Verdict:
    """Compare `value` with the float64 result `exact`.

    plain: result of the plain PyTorch path at `dtype` from the same inputs; None allows only the floor.
    dtype: dtype of the computation that is judged.
    plain_error: a relative RMS error known of the plain path, beside that of `plain`: a tensor of a few elements is
        one draw of the error, and its neighbours tell more of it.
    scale: least RMS that errors are divided by, for a tensor that is zero but for cancellation.
    """
    plain_worst = 0.0
    if plain is not None:
        plain_error = max(plain_error, relative_rms(plain, exact, scale))
        plain_worst = largest_error(plain, exact, scale)
    allowed = 2.0 * max(plain_error, floor(dtype))
    error = relative_rms(value, exact, scale)
    worst = largest_error(value, exact, scale)
    worst_allowed = max(MAX_OVER_RMS * allowed, 2.0 * plain_worst)
    return Verdict(error <= allowed and worst <= worst_allowed, error, allowed, worst, worst_allowed)


def largest_error(value: Tensor, exact: Tensor, scale: float = 0.0) -> float:
    """Largest |value - exact| in units of max(rms(exact), scale), absolute where that is 0; 0 for an empty tensor."""
    difference = (value.detach().double().cpu() - exact.detach().double().cpu()).abs()
    return float(difference.max()) / (max(rms(exact), scale) or 1.0) if difference.numel() else 0.0

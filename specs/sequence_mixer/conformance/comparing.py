"""Two ways to the same numbers, compared within the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sequence_mixer.conformance import budget
from sequence_mixer.conformance.probes import Subject, plain_backend
from sequence_mixer.mixer import SequenceMixer

Values = dict[str, Tensor]
Run = Callable[[SequenceMixer, Tensor], Tensor]
Way = Callable[[Subject, SequenceMixer], Values]

Draw = tuple[Values, Values, Values]  # what is judged, the float64 result, the result of the plain path

CANCELLATION = 1e-3  # a gradient this much smaller than the largest one is judged on the scale of this share of it
FEW = 512  # elements: the ratio of the errors of two smaller tensors is chance as much as accuracy
DRAWS = 8  # of parameters, over which the error of a small tensor is taken


def with_gradients(subject: Subject, mixer: SequenceMixer, x: Tensor, run: Run) -> Values:
    """`run(mixer, x)` and the gradients of a fixed random weighting of it, of x and of every parameter."""
    x = x.detach().clone().requires_grad_()
    y = run(mixer, x)
    cotangent = subject.random(y.shape, seed=99).to(y.dtype)
    names = [name for name, parameter in mixer.named_parameters() if parameter.requires_grad]
    wanted = [x, *(parameter for parameter in mixer.parameters() if parameter.requires_grad)]
    found = torch.autograd.grad(y, wanted, cotangent, allow_unused=True)
    values = {"output": y.detach()}
    for name, tensor, gradient in zip(["x", *names], wanted, found, strict=True):
        values[f"gradient of {name}"] = torch.zeros_like(tensor) if gradient is None else gradient.detach()
    return values


def agree(
    subject: Subject,
    what: str,
    got: Values,
    exact: Values,
    plain: Values,
    again: Callable[[int], Draw] | None = None,
) -> None:
    """Fail unless every tensor of `got` is as near to `exact` as the budget allows.

    exact: float64 results. plain: results of the plain path in the subject's dtype, which set the allowance; empty if
    both sides are float64 runs of the same computation.
    again: `again(seed)` gives the three for other parameters. A tensor of few elements that is outside its allowance is
        judged by the errors of several such draws together, its own among them, on both sides of the comparison.
    """
    draws: list[Draw] = [(got, exact, plain)]
    for name, value in got.items():
        wanted = exact[name]
        subject.require(
            value.shape == wanted.shape, f"{what}: {name} has shape {list(value.shape)}, wanted {list(wanted.shape)}"
        )
        verdict = _judge(subject, name, draws[:1])
        if not verdict.ok and again is not None and plain and value.numel() <= FEW:
            draws += [again(seed) for seed in range(len(draws), DRAWS)]
            verdict = _judge(subject, name, draws)
        subject.require(verdict.ok, f"{what}: {name} differs, {verdict}")


def _judge(subject: Subject, name: str, draws: list[Draw]) -> budget.Verdict:
    """The verdict on one tensor, from the errors of all draws together beside its values in all draws together.

    Relative errors draw by draw would be those of the one draw in which the tensor happens to cancel.
    """
    got, exact, plain = (_together(values, name) for values in zip(*draws, strict=True))
    assert got is not None
    assert exact is not None
    least = [_least_scale(draw[1]) if name.startswith("gradient") else 0.0 for draw in draws]
    usual = [usual_error(plain_values, exact_values) if plain_values else budget.SAME_FLOAT64
             for _, exact_values, plain_values in draws]  # fmt: skip
    return budget.judge(got, exact, plain, subject.dtype, plain_error=_mean(usual), scale=_mean(least))


def _together(values: Sequence[Values], name: str) -> Tensor | None:
    """The tensor of that name of every draw, in one; None if there are none."""
    parts = [part[name].detach().double().cpu().flatten() for part in values if name in part]
    return torch.cat(parts) if parts else None


def _mean(values: list[float]) -> float:
    """Root mean square."""
    return float(torch.tensor(values, dtype=torch.float64).square().mean().sqrt())


def _least_scale(exact: Mapping[str, Tensor]) -> float:
    gradients = [budget.rms(value) for name, value in exact.items() if name.startswith("gradient")]
    return CANCELLATION * max(gradients, default=0.0)


def usual_error(values: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Median over the tensors of the relative RMS error: what one small tensor, a draw of few numbers, cannot tell."""
    least = _least_scale(exact)
    errors = sorted(budget.relative_rms(value, exact[name], least) for name, value in values.items())
    return errors[len(errors) // 2]


def require_precise(subject: Subject, what: str, plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """Fail if the plain path, whose error is the measure of the others, errs more than its dtype explains."""
    ceiling = budget.PLAIN_CEILING[subject.dtype]
    errors = {"output": budget.relative_rms(plain["output"], exact["output"]), "median": usual_error(plain, exact)}
    for name, error in errors.items():
        subject.require(error <= ceiling, f"{what}: {name} error {error:.2e} of the plain path is above {ceiling:.2e}")


def compare(subject: Subject, what: str, actual: Way, expected: Way, *, seed: int = 0) -> None:
    """Fail unless `actual(subject, mixer)` gives what `expected(subject, mixer)` gives.

    In float64 both run on the automatic backend. In a narrower dtype the truth is `expected` in float64 from the same
    rounded parameters and inputs, and the allowance is the error of `expected` on the plain backend.
    """
    if subject.dtype == torch.float64:
        mixer = subject.build(seed)
        agree(subject, what, actual(subject, mixer), expected(subject, mixer), {})
        return

    def draw(seed: int) -> Draw:
        mixer, plain = subject.build(seed), subject.build(seed)
        wide, exact_mixer = widened(subject, mixer)
        plain.backend = plain_backend(subject.capabilities)
        exact = expected(wide, exact_mixer)
        return actual(subject, mixer), exact, expected(subject, plain)

    agree(subject, what, *draw(seed), again=lambda more: draw(seed + more))


def widened(subject: Subject, mixer: SequenceMixer) -> tuple[Subject, SequenceMixer]:
    """The subject in float64 and a float64 mixer with exactly the values of `mixer`'s parameters and buffers."""
    wide = subject.at(torch.float64)
    exact = wide.build()
    exact.load_state_dict(mixer.state_dict())
    return wide, exact


def largest_change(a: Tensor, b: Tensor) -> tuple[float, int]:
    """Largest |a - b| of [B,T,D], and the first token t where it differs by more than 0 (T if nowhere)."""
    difference = (a.detach() - b.detach()).abs().nan_to_num(nan=float("inf"))
    if difference.numel() == 0:
        return 0.0, a.shape[1]
    changed = difference.amax(dim=(0, 2)).gt(0).nonzero()
    return float(difference.max()), int(changed[0]) if len(changed) else a.shape[1]

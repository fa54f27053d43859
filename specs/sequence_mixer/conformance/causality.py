"""SM-2: what an output may depend on, and what it has to."""

from __future__ import annotations

import torch

from sequence_mixer.conformance.catalogue import check, declares
from sequence_mixer.conformance.comparing import compare, largest_change
from sequence_mixer.conformance.probes import Subject
from sequence_mixer.mixer import SequenceMixer

SCALES = (1.0, 10.0, 100.0)
SEEN = 1e-9  # least relative change that counts as dependence, in float64


@check("SM-2", applies=declares("causal"), precision="both")
def check_later_tokens_leave_earlier_outputs_alone(subject: Subject) -> None:
    """Outputs before t do not change when the tokens from t on do, at scales 1, 10 and 100."""
    subject.needs_tokens(2)
    mixer, tokens = subject.build(), subject.length(40)
    x = subject.input(2, tokens)
    before = mixer(x).detach()
    for scale in SCALES:
        for start in sorted({1, (tokens * 3) // 7 or 1, tokens - 1}):
            changed = torch.cat([x[:, :start], subject.input(2, tokens - start, seed=7, scale=scale)], dim=1)
            after = mixer(changed).detach()
            worst, first = largest_change(before[:, :start], after[:, :start])
            allowed = subject.causality_tolerance(tokens, after)
            subject.require(
                worst <= allowed,
                f"changing tokens from t={start} changed the output at t={first} by {worst:.2e}, allowed {allowed:.1e}",
            )


@check("SM-2", applies=declares("causal"), precision="both")
def check_earlier_outputs_send_no_gradient_to_later_tokens(subject: Subject) -> None:
    """The gradient of outputs before t with respect to the tokens from t on is zero."""
    subject.needs_tokens(2)
    mixer, tokens = subject.build(), subject.length(40)
    x = subject.input(2, tokens).requires_grad_()
    start = (tokens * 3) // 7 or 1
    y = mixer(x)
    cotangent = subject.random(y.shape, seed=8)
    cotangent[:, start:] = 0
    (gradient,) = torch.autograd.grad(y, x, cotangent)
    worst, _ = largest_change(gradient[:, start:], torch.zeros_like(gradient[:, start:]))
    allowed = subject.causality_tolerance(tokens, gradient)
    subject.require(
        worst <= allowed, f"outputs before t={start} sent a gradient of {worst:.2e} to later tokens ({allowed:.2e})"
    )


def _reach(subject: Subject, mixer: SequenceMixer, source: int) -> torch.Tensor:
    """Bool [T]: whose outputs change when the token at `source` changes."""
    x = subject.input(2, subject.length(24))
    changed = x.clone()
    changed[:, source] = -2.0 * x[:, source] + subject.input(2, 1, seed=11)[:, 0]
    before, after = mixer(x).detach(), mixer(changed).detach()
    moved: torch.Tensor = (before - after).abs().amax(dim=(0, 2)) > SEEN * before.abs().max()
    return moved


@check("SM-2", applies=declares("causal"))
def check_outputs_depend_on_earlier_tokens(subject: Subject) -> None:
    """Changing a token changes its own output or a later one, and a token far back is not lost."""
    subject.needs_tokens(2)
    mixer, tokens = subject.build(), subject.length(24)
    for source in sorted({0, tokens // 2, tokens - 2}):
        seen = _reach(subject, mixer, source)
        subject.require(
            bool(seen[source + 1 :].any()),
            f"no output after t={source} depends on the token at t={source}: nothing is mixed",
        )


@check("SM-2", applies=declares("bidirectional"))
def check_outputs_depend_on_both_sides(subject: Subject) -> None:
    """Changing a token in the middle changes outputs before it and after it."""
    subject.needs_tokens(3)
    mixer, tokens = subject.build(), subject.length(24)
    middle = tokens // 2
    seen = _reach(subject, mixer, middle)
    subject.require(bool(seen[:middle].any()), f"no output before t={middle} depends on it, bidirectional is declared")
    subject.require(bool(seen[middle + 1 :].any()), f"no output after t={middle} depends on it")


@check("SM-2", applies=declares("causal"), precision="both")
def check_a_prefix_gives_the_first_outputs(subject: Subject) -> None:
    """f(x[:n]) = f(x)[:n] for several n."""
    tokens = subject.length(min(2 * subject.chunk + 3, 150))
    for n in sorted({1, tokens // 3 or 1, tokens // 2 or 1, max(tokens - 1, 1)}):
        compare(
            subject,
            f"the first {n} of {tokens} tokens alone",
            lambda at, mixer, n=n: {"output": mixer(at.input(2, tokens)[:, :n]).detach()},  # type: ignore[misc]
            lambda at, mixer, n=n: {"output": mixer(at.input(2, tokens)).detach()[:, :n]},  # type: ignore[misc]
        )

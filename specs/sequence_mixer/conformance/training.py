"""SM-17: what the training loop asks of a mixer."""

from __future__ import annotations

import torch

from sequence_mixer.conformance.catalogue import check
from sequence_mixer.conformance.probes import Subject
from sequence_mixer.conformance.purity import require_same, snapshot

HINTS = ("weight_decay", "lr_scale")


@check("SM-17")
def check_optimiser_hints_name_parameters(subject: Subject) -> None:
    """parameter_groups() names existing parameters and gives weight_decay or lr_scale, at least 0."""
    mixer = subject.build()
    known = dict(mixer.named_parameters())
    for name, hints in mixer.parameter_groups().items():
        subject.require(name in known, f"parameter_groups() names {name!r}, which is no parameter")
        for hint, value in hints.items():
            subject.require(hint in HINTS, f"the hint {hint!r} of {name} is none of {', '.join(HINTS)}")
            subject.require(float(value) >= 0.0, f"the hint {hint} of {name} is {value}, wanted at least 0")


@check("SM-17")
def check_after_step_is_reproducible(subject: Subject) -> None:
    """after_step with the same generator state leaves two equal mixers equal, and finite."""
    mixers = [subject.build(), subject.build()]
    for mixer in mixers:
        generator = torch.Generator(device=subject.device).manual_seed(5)
        for step in (1, 2):
            mixer.after_step(step, generator=generator)
    require_same(subject, "after_step on two equal mixers", snapshot(mixers[1]), snapshot(mixers[0]))
    y = mixers[0](subject.input(1, subject.length(9)))
    subject.require(bool(y.isfinite().all()), "the output after after_step is not finite")


@check("SM-17")
def check_a_step_downhill_lowers_the_loss(subject: Subject) -> None:
    """A small step along the negative gradient lowers a quadratic loss by what the gradient predicts, within 10%."""
    mixer, x = subject.build(), subject.input(2, subject.length(17))
    target = subject.random(x.shape, seed=13)
    loss = (mixer(x) - target).square().mean()
    parameters = [p for p in mixer.parameters() if p.requires_grad]
    if not parameters:
        return
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    slope = sum(float(g.double().square().sum()) for g in gradients if g is not None)
    subject.require(slope > 0.0, "the loss has no gradient in any parameter")
    rate = 1e-6 * float(loss.detach()) / slope
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(rate * gradient)
        drop = float(loss) - float((mixer(x) - target).square().mean())
    subject.require(
        abs(drop - rate * slope) <= 0.1 * rate * slope,
        f"a step should lower the loss by {rate * slope:.3e}, did {drop:.3e}",
    )

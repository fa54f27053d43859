"""SM-16: what is declared works, and what is not declared is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sequence_mixer.conformance.catalogue import check
from sequence_mixer.conformance.probes import Subject, boundaries
from sequence_mixer.errors import UnsupportedCapability
from sequence_mixer.mixer import SequenceMixer


def uses(subject: Subject, mixer: SequenceMixer) -> dict[str, list[Callable[[], Any]]]:
    """Calls that need a capability, by its name."""
    tokens = subject.length(6)
    one, two = subject.input(1, tokens), subject.input(2, tokens)
    mask = torch.ones(2, tokens, dtype=torch.bool, device=subject.device)
    mask[0, tokens - 1 :] = tokens == 1
    cu_seqlens = boundaries([tokens, 0], subject.device)
    able = subject.capabilities

    def extended() -> Any:
        state = mixer.initial_state(2) if able.stateful else None
        return mixer.extend(two, state)

    return {
        "stateful": [lambda: mixer.initial_state(2), extended],
        "varlen": [lambda: mixer(one, cu_seqlens=cu_seqlens)],
        "padding_mask": [lambda: mixer(two, padding_mask=mask)],
        "matrix_form": [lambda: mixer.matrix_form(two).matrix],
    }


@check("SM-16")
def check_declared_capabilities_are_served(subject: Subject) -> None:
    """A declared capability raises nothing."""
    mixer = subject.build()
    for capability, calls in uses(subject, mixer).items():
        if not subject.capabilities.has(capability):
            continue
        for call in calls:
            try:
                call()
            except Exception as error:
                subject.fail(f"{capability} is declared and raised {type(error).__name__}: {error}")


@check("SM-16")
def check_undeclared_capabilities_are_refused(subject: Subject) -> None:
    """A capability that is not declared raises UnsupportedCapability that names the mixer and the capability."""
    mixer = subject.build()
    for capability, calls in uses(subject, mixer).items():
        if subject.capabilities.has(capability):
            continue
        for call in calls:
            try:
                call()
            except UnsupportedCapability as error:
                named = error.mixer == subject.name and error.capability == capability
                subject.require(named, f"{capability}: the error names {error.mixer!r}, {error.capability!r}")
            except Exception as error:
                subject.fail(f"{capability} is not declared and raised {type(error).__name__}: {error}")
            else:
                subject.fail(f"{capability} is not declared and was accepted")


@check("SM-16")
def check_capabilities_are_those_of_the_definition(subject: Subject) -> None:
    """mixer.capabilities is capabilities_of(config), and makes sense."""
    mixer, able = subject.build(), subject.capabilities
    subject.require(mixer.capabilities == able, "mixer.capabilities differs from MixerDef.capabilities_of(config)")
    subject.require(mixer.config == subject.config, "mixer.config is not the config it was built from")
    subject.require(mixer.name == subject.name, f"the mixer calls itself {mixer.name!r}")
    subject.require(mixer.backend == "auto", f"a new mixer has backend {mixer.backend!r}, wanted 'auto'")
    subject.require(not (able.causal and able.bidirectional), "causal and bidirectional contradict each other")
    subject.require(not (able.stateful and not able.causal), "stateful needs causal")
    subject.require(bool(able.backends), "no backend is declared")
    names = [spec.name for spec in able.backends]
    subject.require(len(set(names)) == len(names), f"a backend is declared twice: {', '.join(names)}")
    subject.require(
        not able.max_length or "max_length" in type(subject.config).model_fields,
        "max_length is declared, not an option",
    )

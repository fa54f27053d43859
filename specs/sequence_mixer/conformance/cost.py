"""SM-14: the cost model against what is counted."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from sequence_mixer.conformance.catalogue import CheckSkipped, check, declares
from sequence_mixer.conformance.probes import Subject
from sequence_mixer.mixer import SequenceMixer

WITHIN = 0.15  # of the counted FLOPs and bytes
BATCH, TOKENS = 2, 64


def counted_flops(mixer: SequenceMixer, x: torch.Tensor) -> int:
    """FLOPs of forward(x) as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(x)
    return int(counter.get_total_flops())


@check("SM-14")
def check_cost_counts_the_parameters_exactly(subject: Subject) -> None:
    """cost().parameters is the number of parameter elements."""
    mixer = subject.build()
    told, counted = mixer.cost(BATCH, TOKENS, torch.float32).parameters, sum(p.numel() for p in mixer.parameters())
    subject.require(told == counted, f"cost() says {told} parameters, the mixer has {counted}")


@check("SM-14")
def check_cost_predicts_the_flops(subject: Subject) -> None:
    """cost().flops is within 15% of torch's FLOP counter on the automatic path."""
    at = subject.at(torch.float32)
    tokens = subject.length(TOKENS)
    mixer = at.build()
    told, counted = mixer.cost(BATCH, tokens, torch.float32).flops, counted_flops(mixer, at.input(BATCH, tokens))
    if counted == 0 and told == 0:
        raise CheckSkipped("neither cost() nor torch's counter sees a FLOP")
    subject.require(
        abs(told - counted) <= WITHIN * max(counted, 1),
        f"cost() says {told} FLOPs at T={tokens}, torch counts {counted}",
    )


@check("SM-14")
def check_cost_predicts_the_least_bytes(subject: Subject) -> None:
    """cost().bytes is parameters and inputs read once and outputs written once, in the dtype asked for, within 15%."""
    mixer, tokens = subject.build(), subject.length(TOKENS)
    elements = sum(p.numel() for p in mixer.parameters()) + 2 * BATCH * tokens * subject.config.d_model
    for dtype in (torch.float32, torch.bfloat16):
        told, least = mixer.cost(BATCH, tokens, dtype).bytes, elements * dtype.itemsize
        subject.require(
            abs(told - least) <= WITHIN * least,
            f"cost() says {told} bytes in {dtype}, parameters and x, y take {least}",
        )


@check("SM-14", applies=declares("stateful"))
def check_cost_counts_the_state_exactly(subject: Subject) -> None:
    """cost().state_elements is the number of elements of the state after T tokens, with just enough capacity."""
    mixer, tokens = subject.build(), subject.length(TOKENS)
    with torch.no_grad():
        _, state = mixer.extend(subject.input(BATCH, tokens), mixer.initial_state(BATCH, capacity=tokens))
    counted = sum(leaf.numel() for leaf in state.leaves().values())
    told = mixer.cost(BATCH, tokens, torch.float32).state_elements
    subject.require(told == counted, f"cost() says {told} state elements, the state has {counted}")

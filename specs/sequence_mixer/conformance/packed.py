"""SM-4: sequences packed into one row do not know of each other."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sequence_mixer.conformance.catalogue import check, declares
from sequence_mixer.conformance.comparing import Values, compare, with_gradients
from sequence_mixer.conformance.probes import Subject, boundaries
from sequence_mixer.mixer import SequenceMixer


def packed_lengths(subject: Subject) -> list[int]:
    """Lengths of the sequences of a pack: an empty one first, inside and last, one of a single token, some longer."""
    return [0, subject.length(6), subject.length(1), 0, subject.length(19), subject.length(3), 0]


def separately(mixer: SequenceMixer, x: Tensor, lengths: list[int]) -> Tensor:
    """Every sequence in a call of its own, [1,T,D]."""
    ends = list(itertools.accumulate(lengths, initial=0))
    return torch.cat([mixer(x[:, a:b]) for a, b in itertools.pairwise(ends) if b > a], dim=1)


@check("SM-4", applies=declares("varlen"), precision="both")
def check_packed_equals_separate(subject: Subject) -> None:
    """Outputs and gradients with `cu_seqlens` are those of the sequences run one by one, empty ones included."""
    lengths = packed_lengths(subject)
    total = sum(lengths)
    for kind in (torch.int32, torch.int64):
        cu_seqlens = boundaries(lengths, subject.device, kind)
        compare(
            subject,
            f"sequences of {lengths} tokens packed with {kind} boundaries",
            lambda at, mixer, cu=cu_seqlens: with_gradients(  # type: ignore[misc]
                at, mixer, at.input(1, total), lambda m, x: m(x, cu_seqlens=cu)
            ),
            lambda at, mixer: with_gradients(at, mixer, at.input(1, total), lambda m, x: separately(m, x, lengths)),
        )


@check("SM-4", applies=declares("varlen"), precision="both")
def check_nothing_crosses_a_boundary(subject: Subject) -> None:
    """Changing one packed sequence, at scale 100, leaves the outputs of the others bit for bit alone."""
    lengths = packed_lengths(subject)
    mixer, x = subject.build(), subject.input(1, sum(lengths))
    cu_seqlens = boundaries(lengths, subject.device)
    before = mixer(x, cu_seqlens=cu_seqlens).detach()
    for a, b in itertools.pairwise(cu_seqlens.tolist()):
        if a == b:
            continue
        changed = x.clone()
        changed[:, a:b] = subject.input(1, b - a, seed=31, scale=100.0)
        difference = (mixer(changed, cu_seqlens=cu_seqlens).detach() - before).abs()
        difference[:, a:b] = 0
        worst = float(difference.max())
        allowed = subject.causality_tolerance(x.shape[1], 100.0 * before)
        subject.require(
            worst <= allowed, f"changing the packed sequence at {a}:{b} changed the output of others by {worst:.2e}"
        )


@check("SM-4", applies=declares("varlen", "stateful"), precision="both")
def check_packed_states_equal_separate_states(subject: Subject) -> None:
    """`extend` of packed pieces from states of batch S, outputs, gradients and what the states lead to."""
    subject.needs_tokens(11)
    pieces = ([4, 0, 1, 3], [0, 2, 4, 1])
    after, rows = 3, 4

    def parts(x: Tensor) -> list[Tensor]:
        return list(x.split([sum(pieces[0]), sum(pieces[1]), after * rows], dim=1))

    def packed(mixer: SequenceMixer, x: Tensor) -> Tensor:
        one, two, three = parts(x)
        state = mixer.initial_state(rows)
        y1, state = mixer.extend(one, state, cu_seqlens=boundaries(pieces[0], x.device))
        y2, state = mixer.extend(two, state, cu_seqlens=boundaries(pieces[1], x.device))
        y3, _ = mixer.extend(three.reshape(rows, after, -1), state)
        return torch.cat([y1, y2, y3.reshape(1, rows * after, -1)], dim=1)

    def alone(mixer: SequenceMixer, x: Tensor) -> Tensor:
        one, two, three = parts(x)
        inputs = [one.split(pieces[0], 1), two.split(pieces[1], 1), three.split(after, 1)]
        outputs: list[list[Tensor]] = [[], [], []]
        for row in range(rows):
            whole = torch.cat([part[row] for part in inputs], dim=1)
            y = mixer(whole).split([part[row].shape[1] for part in inputs], dim=1)
            for kept, piece in zip(outputs, y, strict=True):
                kept.append(piece)
        return torch.cat([piece for part in outputs for piece in part], dim=1)

    total = sum(map(sum, pieces)) + after * rows

    def actual(at: Subject, mixer: SequenceMixer) -> Values:
        return with_gradients(at, mixer, at.input(1, total), packed)

    def expected(at: Subject, mixer: SequenceMixer) -> Values:
        return with_gradients(at, mixer, at.input(1, total), alone)

    def without_grad(at: Subject, mixer: SequenceMixer) -> Values:
        with torch.no_grad():
            return {"output": packed(mixer, at.input(1, total))}

    compare(subject, "packed pieces with states", actual, expected)
    compare(subject, "packed pieces with states, grad off", without_grad, expected)

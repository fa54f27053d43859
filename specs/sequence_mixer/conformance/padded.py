"""SM-5: padding changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.conformance.catalogue import check, declares
from sequence_mixer.conformance.comparing import Values, compare, with_gradients
from sequence_mixer.conformance.probes import Subject
from sequence_mixer.mixer import SequenceMixer

Run = tuple[int, int]  # first real token and the one behind the last


def runs(tokens: int) -> list[Run]:
    """Real tokens of each row: right padded, left padded, both, none padded, all padded."""
    return [(0, tokens * 2 // 3 or 1), (tokens // 2, tokens), (tokens // 4, tokens * 3 // 4 or 1), (0, tokens), (0, 0)]


def mask_of(rows: list[Run], tokens: int, device: torch.device) -> Tensor:
    """bool [B,T], True at real tokens."""
    place = torch.arange(tokens, device=device)
    return torch.stack([(place >= first) & (place < end) for first, end in rows])


def unpadded(mixer: SequenceMixer, x: Tensor, rows: list[Run]) -> Tensor:
    """Every row run alone without its padding, put back between zeros."""
    outputs = []
    for row, (first, end) in enumerate(rows):
        ends = (x.new_zeros(first, x.shape[2]), x.new_zeros(x.shape[1] - end, x.shape[2]))
        middle = mixer(x[row : row + 1, first:end])[0] if end > first else x.new_zeros(0, x.shape[2])
        outputs.append(torch.cat([ends[0], middle.to(x.dtype), ends[1]]))
    return torch.stack(outputs)


@check("SM-5", applies=declares("padding_mask"), precision="both")
def check_padded_equals_unpadded(subject: Subject) -> None:
    """Outputs and gradients with padding on either side are those of the rows run without it."""
    tokens = subject.length(21)
    rows = runs(tokens)
    mask = mask_of(rows, tokens, subject.device)
    compare(
        subject,
        "a padded batch",
        lambda at, mixer: with_gradients(at, mixer, at.input(len(rows), tokens), lambda m, x: m(x, padding_mask=mask)),
        lambda at, mixer: with_gradients(at, mixer, at.input(len(rows), tokens), lambda m, x: unpadded(m, x, rows)),
    )


@check("SM-5", applies=declares("padding_mask"), precision="both")
def check_padded_outputs_are_zero(subject: Subject) -> None:
    """The output at a padded slot is exactly 0."""
    tokens = subject.length(21)
    mask = mask_of(runs(tokens), tokens, subject.device)
    y = subject.build()(subject.input(len(mask), tokens), padding_mask=mask).detach()
    worst = float(y[~mask].abs().max()) if bool((~mask).any()) else 0.0
    subject.require(worst == 0.0, f"the output at padded slots is as large as {worst:.2e}, wanted 0")


@check("SM-5", applies=declares("padding_mask"), precision="both")
def check_nan_in_padded_slots_is_harmless(subject: Subject) -> None:
    """NaN in padded slots changes no output and no gradient; the gradient there is 0."""
    tokens = subject.length(21)
    mask = mask_of(runs(tokens), tokens, subject.device)
    mixer, x = subject.build(), subject.input(len(mask), tokens)
    poisoned = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    clean = with_gradients(subject, mixer, x, lambda m, value: m(value, padding_mask=mask))
    other = with_gradients(subject, mixer, poisoned, lambda m, value: m(value, padding_mask=mask))
    for name, value in clean.items():
        same = bool((value == other[name]).all())
        subject.require(same, f"NaN in padded slots changed the {name}")
    outside = clean["gradient of x"][~mask]
    subject.require(not bool(outside.any()), "the gradient of x at padded slots is not 0")


@check("SM-5", applies=declares("padding_mask", "stateful"), precision="both")
def check_padding_does_not_reach_the_state(subject: Subject) -> None:
    """The state after a padded piece is the one after its real tokens, from the empty and from a later state."""
    subject.needs_tokens(12)
    piece, after = 6, 3
    rows = [[(0, 4), (2, 6), (0, 0), (1, 5)], [(3, 6), (0, 6), (0, 2), (0, 0)]]
    batch = len(rows[0])

    def padded(mixer: SequenceMixer, x: Tensor) -> Tensor:
        state = mixer.initial_state(batch)
        outputs = []
        for index, part in enumerate(x[:, : 2 * piece].split(piece, dim=1)):
            y, state = mixer.extend(part, state, padding_mask=mask_of(rows[index], piece, x.device))
            outputs.append(y)
        y, _ = mixer.extend(x[:, 2 * piece :], state)
        return torch.cat([*outputs, y], dim=1)

    def alone(mixer: SequenceMixer, x: Tensor) -> Tensor:
        outputs = []
        for row in range(batch):
            (a, b), (c, d) = rows[0][row], rows[1][row]
            places = [*range(a, b), *range(piece + c, piece + d), *range(2 * piece, x.shape[1])]
            y = mixer(x[row : row + 1, places])
            outputs.append(torch.zeros_like(x[row]).index_copy(0, torch.tensor(places, device=x.device), y[0]))
        return torch.stack(outputs)

    def actual(at: Subject, mixer: SequenceMixer) -> Values:
        return with_gradients(at, mixer, at.input(batch, 2 * piece + after), padded)

    def expected(at: Subject, mixer: SequenceMixer) -> Values:
        return with_gradients(at, mixer, at.input(batch, 2 * piece + after), alone)

    def without_grad(at: Subject, mixer: SequenceMixer) -> Values:
        with torch.no_grad():
            return {"output": padded(mixer, at.input(batch, 2 * piece + after))}

    compare(subject, "padded pieces with states", actual, expected)
    compare(subject, "padded pieces with states, grad off", without_grad, expected)

"""SM-3: the state is a value, and `extend` is `forward` in pieces."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sequence_mixer.conformance.catalogue import check, declares
from sequence_mixer.conformance.comparing import compare, with_gradients
from sequence_mixer.conformance.probes import Subject, run_pieces
from sequence_mixer.mixer import SequenceMixer, State
from sequence_mixer.shapes import accumulation_dtype

stateful = declares("stateful")


def cuts(tokens: int) -> dict[str, list[int]]:
    """Ways to cut a sequence, an empty piece among them."""
    uneven, left = [], tokens
    for size in (5, 1, 0, 9, 3):
        uneven.append(min(size, left))
        left -= uneven[-1]
    twos = [2] * (tokens // 2) + [1] * (tokens % 2)
    return {"1": [1] * tokens, "2": twos, "uneven": [*uneven, left], "all": [tokens]}


@check("SM-3", applies=stateful, precision="both")
def check_extend_in_pieces_equals_forward(subject: Subject) -> None:
    """Outputs of `extend` in pieces of 1, of 2, uneven (one empty) and all at once are those of `forward`."""
    tokens = subject.length(25)

    def whole(at: Subject, mixer: SequenceMixer) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"output": mixer(at.input(2, tokens))}

    for what, pieces in cuts(tokens).items():

        def parts(at: Subject, mixer: SequenceMixer, pieces: list[int] = pieces) -> dict[str, Tensor]:
            with torch.no_grad():
                return {"output": run_pieces(mixer, at.input(2, tokens), pieces)[0]}

        compare(subject, f"extend in pieces of {what}", parts, whole)


@check("SM-3", applies=stateful, precision="both")
def check_extend_in_pieces_has_the_gradients_of_forward(subject: Subject) -> None:
    """Gradients through `extend` and the states between the pieces are those of `forward`."""
    tokens = subject.length(17)
    for what, pieces in cuts(tokens).items():
        compare(
            subject,
            f"extend in pieces of {what}",
            lambda at, mixer, pieces=pieces: with_gradients(  # type: ignore[misc]
                at, mixer, at.input(2, tokens), lambda m, x: run_pieces(m, x, pieces)[0]
            ),
            lambda at, mixer: with_gradients(at, mixer, at.input(2, tokens), lambda m, x: m(x)),
        )


@check("SM-3", applies=stateful, precision="both")
def check_extend_continues_from_a_state(subject: Subject) -> None:
    """From the state of a prefix, `extend` gives the rest of `forward`, however state and rest were cut."""
    subject.needs_tokens(3)
    tokens = subject.length(31)
    first = tokens // 2
    for what, pieces in cuts(tokens - first).items():

        def parts(at: Subject, mixer: SequenceMixer, pieces: list[int] = pieces) -> dict[str, Tensor]:
            x = at.input(2, tokens)
            with torch.no_grad():
                _, state = mixer.extend(x[:, :first], mixer.initial_state(2))
                return {"output": run_pieces(mixer, x[:, first:], pieces, state)[0]}

        def whole(at: Subject, mixer: SequenceMixer) -> dict[str, Tensor]:
            with torch.no_grad():
                return {"output": mixer(at.input(2, tokens))[:, first:]}

        compare(subject, f"extend from a state in pieces of {what}", parts, whole)


@check("SM-3", applies=stateful, precision="both")
def check_old_states_stay_valid(subject: Subject) -> None:
    """`extend` changes no state it was given: from a kept state, the same tokens give the same outputs again."""
    subject.needs_tokens(4)
    mixer, tokens = subject.build(), subject.length(16)
    x = subject.input(2, tokens)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            kept = [mixer.initial_state(2)]
            outputs = []
            for piece in x.split(tokens // 4 or 1, dim=1):
                y, state = mixer.extend(piece, kept[-1])
                outputs.append(y.detach().clone())
                kept.append(state)
            for index, piece in reversed(list(enumerate(x.split(tokens // 4 or 1, dim=1)))):
                again, _ = mixer.extend(piece, kept[index])
                worst = float((again.detach() - outputs[index]).abs().max())
                limit = 1e3 * torch.finfo(subject.dtype).eps * float(outputs[index].abs().max())
                subject.require(
                    worst <= limit, f"going back to state {index} gave other outputs than before, by {worst:.2e}"
                )


@check("SM-3", applies=stateful, precision="both")
def check_forks_are_independent(subject: Subject) -> None:
    """Two continuations of one state, taken in turns, are the two sequences run alone."""
    subject.needs_tokens(4)
    tokens = subject.length(24)
    shared = tokens // 2

    def pieces(at: Subject) -> tuple[Tensor, Tensor, Tensor]:
        x, other = at.input(2, tokens), at.input(2, tokens, seed=21)
        return x[:, :shared], x[:, shared:], other[:, shared:]

    def forked(at: Subject, mixer: SequenceMixer) -> dict[str, Tensor]:
        start, left, right = pieces(at)
        with torch.no_grad():
            _, state = mixer.extend(start, mixer.initial_state(2))
            states, outputs = [state, state], [[], []]  # type: ignore[var-annotated]
            for token in range(left.shape[1]):
                for side, x in enumerate((left, right)):
                    y, states[side] = mixer.extend(x[:, token : token + 1], states[side])
                    outputs[side].append(y)
        return {"left fork": torch.cat(outputs[0], 1), "right fork": torch.cat(outputs[1], 1)}

    def alone(at: Subject, mixer: SequenceMixer) -> dict[str, Tensor]:
        start, left, right = pieces(at)
        with torch.no_grad():
            ends = [mixer(torch.cat([start, end], 1))[:, shared:] for end in (left, right)]
        return {"left fork": ends[0], "right fork": ends[1]}

    compare(subject, "two forks of one state", forked, alone)


@check("SM-3", applies=stateful, precision="both")
def check_donated_states_give_the_same_outputs(subject: Subject) -> None:
    """With donate=True the outputs are those without, in token steps and in larger pieces, with capacity or none."""
    tokens = subject.length(21)
    for pieces in (cuts(tokens)["1"], cuts(tokens)["uneven"]):
        for capacity in (None, tokens):

            def donated(
                at: Subject, mixer: SequenceMixer, pieces: list[int] = pieces, capacity: int | None = capacity
            ) -> dict[str, Tensor]:
                with torch.no_grad():
                    state = mixer.initial_state(2, capacity=capacity)
                    return {"output": run_pieces(mixer, at.input(2, tokens), pieces, state, donate=True)[0]}

            def whole(at: Subject, mixer: SequenceMixer) -> dict[str, Tensor]:
                with torch.no_grad():
                    return {"output": mixer(at.input(2, tokens))}

            compare(subject, f"donated states, capacity {capacity}", donated, whole)


@check("SM-3", applies=stateful)
def check_a_state_is_a_value(subject: Subject) -> None:
    """A State is frozen, a pytree of real tensors with batch first, and its rows can be moved, dropped and repeated."""
    subject.needs_tokens(3)
    mixer, tokens = subject.build(), subject.length(12)
    x = subject.input(3, tokens)
    half = tokens // 2
    with torch.no_grad():
        _, state = mixer.extend(x[:, :half], mixer.initial_state(3))
        subject.require(isinstance(state, State), f"the state is {type(state).__name__}, wanted a State")
        for name, leaf in state.leaves().items():
            subject.require(isinstance(leaf, Tensor), f"state.{name} is {type(leaf).__name__}, wanted a Tensor")
            subject.require(
                leaf.dim() > 0 and leaf.shape[0] == 3, f"state.{name} {list(leaf.shape)}: batch is not first"
            )
            subject.require(not leaf.is_complex(), f"state.{name} is complex")
            subject.require(leaf.device == x.device, f"state.{name} is on {leaf.device}, the input on {x.device}")
        try:
            setattr(state, next(iter(state.leaves())), None)
        except dataclasses.FrozenInstanceError:
            pass
        else:
            subject.fail("a leaf of the state could be replaced; a State is frozen")
        subject.require(state.nbytes > 0, "state.nbytes is 0 after tokens came in")
        want, _ = mixer.extend(x[:, half:], state)
        rows = torch.tensor([2, 0, 0], device=subject.device)
        leaves, structure = pytree.tree_flatten(state)
        copies = {
            "a pytree round trip": (pytree.tree_unflatten(leaves, structure), slice(None)),
            "detach": (state.detach(), slice(None)),
            "to": (state.to(device=subject.device), slice(None)),
            "deepcopy": (copy.deepcopy(state), slice(None)),
            "index_select": (state.index_select(rows), rows),
        }
        taken: Any
        chosen: Any
        for what, (taken, chosen) in copies.items():
            got, _ = mixer.extend(x[chosen, half:], taken)
            worst = float((got - want[chosen]).abs().max())
            subject.require(worst <= 1e-9 * float(want.abs().max()), f"{what} changed what follows by {worst:.2e}")


@check("SM-3", applies=stateful)
def check_recurrent_state_is_kept_in_the_accumulation_dtype(subject: Subject) -> None:
    """A leaf that gathers many tokens is float32 beside half inputs and float64 beside float64.

    A leaf gathers tokens if one of its elements depends both on the first and on the last of a run of 16.
    """
    subject.needs_tokens(8)
    tokens = subject.length(16)
    x = subject.input(1, tokens)
    mixer = subject.build()

    def leaves_for(value: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return mixer.extend(value, mixer.initial_state(1, capacity=tokens))[1].leaves()  # type: ignore[no-any-return]

    def changed_at(token: int) -> Tensor:
        other = x.clone()
        other[:, token] = -3.0 * x[:, token] + 1.0
        return other

    base, first, last = leaves_for(x), leaves_for(changed_at(0)), leaves_for(changed_at(tokens - 1))
    recurrent = [
        name
        for name, leaf in base.items()
        if leaf.is_floating_point() and bool(((leaf != first[name]) & (leaf != last[name])).any())
    ]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        at = subject.at(dtype)
        narrow = at.build()
        with torch.no_grad():
            states = {
                "initial_state": narrow.initial_state(1),
                "extend": narrow.extend(at.input(1, tokens), narrow.initial_state(1))[1],
            }
        for source, state in states.items():
            for name in recurrent:
                came, wanted = state.leaves()[name].dtype, accumulation_dtype(dtype)
                subject.require(
                    came == wanted, f"state.{name} of {source} is {came} beside {dtype} inputs, wanted {wanted}"
                )


@check("SM-3", applies=stateful)
def check_initial_state_takes_device_dtype_and_capacity(subject: Subject) -> None:
    """Defaults are the parameters' device and dtype; given ones are taken; capacity changes no output."""
    mixer = subject.build()
    x = subject.input(2, subject.length(9))
    with torch.no_grad():
        plain = mixer.initial_state(2)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            native = subject.at(dtype).build().initial_state(2)
            asked = mixer.initial_state(2, device=subject.device, dtype=dtype)
            for name, leaf in native.leaves().items():
                other = asked.leaves()[name]
                subject.require(leaf.device == subject.device, f"state.{name} is on {leaf.device}, the mixer elsewhere")
                subject.require(
                    leaf.dtype == other.dtype, f"state.{name} for dtype={dtype} is {other.dtype}, wanted {leaf.dtype}"
                )
        roomy = mixer.initial_state(2, capacity=64)
        worst = float((mixer.extend(x, plain)[0] - mixer.extend(x, roomy)[0]).abs().max())
    subject.require(worst <= 1e-9, f"capacity changed the output by {worst:.2e}")

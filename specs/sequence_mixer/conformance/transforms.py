"""SM-13: torch.compile and activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sequence_mixer.conformance.catalogue import check, declares
from sequence_mixer.conformance.comparing import agree, with_gradients
from sequence_mixer.conformance.padded import mask_of
from sequence_mixer.conformance.probes import Subject, boundaries
from sequence_mixer.conformance.purity import require_same
from sequence_mixer.mixer import SequenceMixer


def compiled(subject: Subject, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile without graph breaks; a break becomes a failure in words."""
    torch._dynamo.reset()
    graph = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)

    def call(*arguments: Any) -> Any:
        try:
            return graph(*arguments)
        except torch._dynamo.exc.TorchDynamoException as reason:
            first = next((line for line in str(reason).splitlines() if line.strip()), "graph break")
            subject.fail(f"torch.compile(fullgraph=True) broke the graph: {first}")

    return call


def _compare_compiled(subject: Subject, what: str, call: Callable[[SequenceMixer, Tensor], Tensor], x: Tensor) -> None:
    mixer = subject.build()
    want = with_gradients(subject, mixer, x, call)
    graph = compiled(subject, lambda value: call(mixer, value))
    try:
        got = with_gradients(subject, mixer, x, lambda m, value: graph(value))
    finally:
        torch._dynamo.reset()
    agree(subject, f"compiled {what}", got, want, {} if subject.dtype == torch.float64 else want)


@check("SM-13", default_only=True)
def check_compiled_forward_equals_eager(subject: Subject) -> None:
    """torch.compile(fullgraph=True) gives the outputs and gradients of eager mode."""
    _compare_compiled(subject, "forward", lambda m, x: m(x), subject.input(2, subject.length(17)))


@check("SM-13", applies=declares("varlen"), default_only=True)
def check_compiled_packing_equals_eager(subject: Subject) -> None:
    """The same with cu_seqlens, whose values the graph may not look at."""
    lengths = [0, subject.length(5), subject.length(12)]
    cu_seqlens = boundaries(lengths, subject.device)
    x = subject.input(1, sum(lengths))
    _compare_compiled(subject, "packing", lambda m, value: m(value, cu_seqlens=cu_seqlens), x)


@check("SM-13", applies=declares("padding_mask"), default_only=True)
def check_compiled_padding_equals_eager(subject: Subject) -> None:
    """The same with a padding mask."""
    tokens = subject.length(12)
    mask = mask_of([(0, tokens), (tokens // 2, tokens)], tokens, subject.device)
    _compare_compiled(subject, "padding", lambda m, x: m(x, padding_mask=mask), subject.input(2, tokens))


@check("SM-13", applies=declares("stateful"), default_only=True)
def check_compiled_extend_equals_eager(subject: Subject) -> None:
    """`extend` compiles with the state as an argument and a result, and goes on from an eager state."""
    mixer, tokens = subject.build(), subject.length(9)
    x = subject.input(2, tokens)
    graph = compiled(subject, lambda value, state: mixer.extend(value, state))
    try:
        with torch.no_grad():
            want = mixer(x)
            first, state = mixer.extend(x[:, : tokens - 1], mixer.initial_state(2))
            last, state = graph(x[:, tokens - 1 :], state)
    finally:
        torch._dynamo.reset()
    agree(subject, "compiled extend", {"output": torch.cat([first, last], 1)}, {"output": want}, {})


@check("SM-13")
def check_activation_checkpointing_changes_nothing(subject: Subject) -> None:
    """torch.utils.checkpoint recomputes the same outputs and gradients, bit for bit."""
    mixer, x = subject.build(), subject.input(2, subject.length(17))
    want = with_gradients(subject, mixer, x, lambda m, value: m(value))
    got = with_gradients(subject, mixer, x, lambda m, value: checkpoint(m, value, use_reentrant=False))
    require_same(subject, "activation checkpointing", got, want)

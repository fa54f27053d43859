"""SM-9: a call changes nothing but its result."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.conformance.catalogue import check, declares
from sequence_mixer.conformance.comparing import Values, with_gradients
from sequence_mixer.conformance.probes import Subject, boundaries, run_pieces
from sequence_mixer.mixer import SequenceMixer


def snapshot(mixer: SequenceMixer) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, those outside the state dict too."""
    return {name: tensor.detach().clone() for name, tensor in [*mixer.named_parameters(), *mixer.named_buffers()]}


def require_same(subject: Subject, what: str, got: Values, want: Values) -> None:
    """Fail unless all tensors are bit for bit the same."""
    subject.require(list(got) == list(want), f"{what}: names changed from {list(want)} to {list(got)}")
    for name, value in want.items():
        other = got[name]
        same = value.shape == other.shape and value.dtype == other.dtype and bool((value == other).all())
        subject.require(same, f"{what}: {name} is not bit for bit the same")


@check("SM-9", precision="both")
def check_inputs_are_not_modified(subject: Subject) -> None:
    """x, cu_seqlens, padding_mask and the cotangent are the same after forward, backward and extend as before."""
    mixer, able, tokens = subject.build(), subject.capabilities, subject.length(17)
    x = subject.input(2, tokens)
    given = {"x": x, "cotangent": subject.random(x.shape, seed=99)}
    arguments: list[dict[str, Tensor]] = [{}]
    if able.varlen:
        given["cu_seqlens"] = boundaries([tokens, 0], subject.device)
        arguments.append({"cu_seqlens": given["cu_seqlens"]})
    if able.padding_mask:
        given["padding_mask"] = torch.ones(2, tokens, dtype=torch.bool, device=subject.device)
        given["padding_mask"][0, tokens // 2 + 1 :] = False
        arguments.append({"padding_mask": given["padding_mask"]})
    before = {name: tensor.clone() for name, tensor in given.items()}
    for options in arguments:
        value = x[:1] if "cu_seqlens" in options else x
        with torch.no_grad():
            mixer(value, **options)
        if able.stateful and "cu_seqlens" not in options:
            with torch.no_grad():
                mixer.extend(value, mixer.initial_state(2), **options)  # type: ignore[arg-type]
        leaf = value.requires_grad_() if value.is_leaf else value.detach().requires_grad_()
        y = mixer(leaf, **options)
        torch.autograd.grad(y, leaf, given["cotangent"][: y.shape[0]])
        x = x.detach()
    require_same(subject, "arguments of a call", {name: tensor.detach() for name, tensor in given.items()}, before)


@check("SM-9")
def check_forward_changes_no_parameter_or_buffer(subject: Subject) -> None:
    """In training and evaluation, with grad and without, forward and extend leave parameters and buffers alone."""
    mixer, x = subject.build(), subject.input(2, subject.length(17))
    before = snapshot(mixer)
    for training in (True, False):
        mixer.train(training)
        with_gradients(subject, mixer, x, lambda m, value: m(value))
        with torch.no_grad():
            mixer(x)
            if subject.capabilities.stateful:
                run_pieces(mixer, x, [1, x.shape[1] - 1], donate=True)
        require_same(subject, f"a call with training={training}", snapshot(mixer), before)


@check("SM-9", precision="both")
def check_training_equals_evaluation(subject: Subject) -> None:
    """train() and eval() give the same outputs and gradients: there is no dropout inside a mixer."""
    mixer, x = subject.build(), subject.input(2, subject.length(17))
    trained = with_gradients(subject, mixer.train(), x, lambda m, value: m(value))
    require_same(subject, "eval() after train()", with_gradients(subject, mixer.eval(), x, lambda m, v: m(v)), trained)


@check("SM-9", precision="both")
def check_results_repeat_bit_for_bit(subject: Subject) -> None:
    """The same call gives the same outputs and gradients, bit for bit, whatever the random state."""
    mixer, x = subject.build(), subject.input(2, subject.length(40))
    first = with_gradients(subject, mixer, x, lambda m, value: m(value))
    for attempt in range(2):
        torch.manual_seed(attempt + 77)
        again = with_gradients(subject, mixer, x, lambda m, value: m(value))
        require_same(subject, "the same call again", again, first)


@check("SM-9")
def check_a_call_draws_no_random_numbers(subject: Subject) -> None:
    """forward leaves the random state alone, so that a checkpointed or resumed run sees the same numbers."""
    mixer, x = subject.build(), subject.input(1, subject.length(9))
    before = torch.get_rng_state()
    mixer.train()(x)
    subject.require(bool((torch.get_rng_state() == before).all()), "forward advanced the global random state")


@check("SM-9", precision="both")
def check_strides_do_not_matter(subject: Subject) -> None:
    """Non-contiguous inputs and cotangents (transposed, sliced, expanded) give what contiguous ones give."""
    mixer, tokens = subject.build(), subject.length(19)
    x = subject.input(2, tokens)
    want = with_gradients(subject, mixer, x, lambda m, value: m(value))
    wide = torch.stack([torch.full_like(x, 7.0), x], dim=-1)
    views = {
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "time first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every other channel": wide[..., 1],
        "a later slice": torch.cat([torch.full_like(x, 7.0), x], dim=1)[:, tokens:],
    }
    limit = 256 * torch.finfo(subject.dtype).eps
    for what, view in views.items():
        leaf = view.detach().requires_grad_()
        y = mixer(leaf)
        weights = subject.random(y.shape, seed=99)
        cotangents = {"contiguous": weights, "transposed": weights.transpose(1, 2).contiguous().transpose(1, 2)}
        for kind, cotangent in cotangents.items():
            (gradient,) = torch.autograd.grad(y, leaf, cotangent, retain_graph=True)
            for name, got in {"output": y, "gradient of x": gradient}.items():
                worst = float((got - want[name]).detach().abs().max())
                allowed = limit * float(want[name].abs().max())
                subject.require(
                    worst <= allowed, f"x {what}, cotangent {kind}: {name} differs by {worst:.2e} ({allowed:.2e})"
                )
    leaf = x.clone().requires_grad_()
    ones = torch.ones((), device=x.device, dtype=x.dtype)
    (expanded,) = torch.autograd.grad(mixer(leaf), leaf, ones.expand(x.shape))
    (dense,) = torch.autograd.grad(mixer(leaf), leaf, torch.ones_like(x))
    worst = float((expanded - dense).abs().max())
    subject.require(
        worst <= limit * float(dense.abs().max()), f"an expanded cotangent changes gradients by {worst:.2e}"
    )


@check("SM-9", applies=declares("stateful"), precision="both")
def check_extend_takes_any_strides(subject: Subject) -> None:
    """`extend` on a non-contiguous token is `extend` on its copy."""
    mixer, tokens = subject.build(), subject.length(9)
    x = subject.input(2, tokens)
    with torch.no_grad():
        want, _ = run_pieces(mixer, x, [1] * tokens)
        got, _ = run_pieces(mixer, x.transpose(1, 2).contiguous().transpose(1, 2), [1] * tokens)
    worst = float((got - want).abs().max())
    allowed = 256 * torch.finfo(subject.dtype).eps * float(want.abs().max())
    subject.require(worst <= allowed, f"a transposed token changed the output by {worst:.2e} (allowed {allowed:.2e})")

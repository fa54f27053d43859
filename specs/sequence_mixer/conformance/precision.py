"""SM-10: dtypes and autocast."""

from __future__ import annotations

import torch

from sequence_mixer.conformance.catalogue import CheckSkipped, check
from sequence_mixer.conformance.comparing import agree, widened, with_gradients
from sequence_mixer.conformance.interface import served_dtypes
from sequence_mixer.conformance.probes import Subject, plain_backend


@check("SM-10")
def check_autocast_gives_its_dtype_and_its_accuracy(subject: Subject) -> None:
    """Inside bfloat16 autocast the output is bfloat16 and errs no more than the mixer in bfloat16 does, doubled."""
    if torch.bfloat16 not in served_dtypes(subject):
        raise CheckSkipped("no backend serves bfloat16 here")
    at, half = subject.at(torch.float32), subject.at(torch.bfloat16)
    half_mixer = half.build()
    wide, exact_mixer = widened(half, half_mixer)
    mixer = at.build()
    mixer.load_state_dict(half_mixer.state_dict())
    tokens = subject.length(33)
    exact = with_gradients(wide, exact_mixer, wide.input(2, tokens), lambda m, x: m(x))
    half_mixer.backend = plain_backend(subject.capabilities)
    plain = with_gradients(half, half_mixer, half.input(2, tokens), lambda m, x: m(x))

    def inside(mixer, x):  # type: ignore[no-untyped-def]
        with torch.autocast(subject.device.type, dtype=torch.bfloat16):
            return mixer(x)

    got = with_gradients(at, mixer, at.input(2, tokens), inside)
    subject.require(got["output"].dtype == torch.bfloat16, f"inside bfloat16 autocast y is {got['output'].dtype}")
    agree(half, "autocast", got, exact, plain)


@check("SM-10")
def check_nothing_is_complex(subject: Subject) -> None:
    """No parameter or buffer is complex; `.double()` and `.to(bfloat16)` reach every floating one."""
    mixer = subject.built_raw()
    for name, tensor in [*mixer.named_parameters(), *mixer.named_buffers()]:
        subject.require(not tensor.is_complex(), f"{name} is complex; hold real pairs [..., 2]")
    for dtype in (torch.float64, torch.bfloat16):
        for name, parameter in mixer.to(dtype).named_parameters():
            subject.require(parameter.dtype == dtype, f"after .to({dtype}) the parameter {name} is {parameter.dtype}")


@check("SM-10")
def check_gradients_have_the_dtype_of_their_tensor(subject: Subject) -> None:
    """In every dtype served, the gradients of x and of all parameters exist, in that dtype, and are finite."""
    for dtype in served_dtypes(subject):
        at = subject.at(dtype)
        mixer, x = at.build(), at.input(2, at.length(17)).requires_grad_()
        (mixer(x).float() * at.random(x.shape, seed=3).float()).sum().backward()
        for name, tensor in [("x", x), *mixer.named_parameters()]:
            if not tensor.requires_grad:
                continue
            gradient = tensor.grad
            if gradient is None:
                subject.fail(f"{name} got no gradient from the output")
                return
            subject.require(gradient.dtype == tensor.dtype, f"the gradient of {name} is {gradient.dtype}")
            subject.require(bool(gradient.isfinite().all()), f"the gradient of {name} in {dtype} is not finite")

"""SM-1: what goes in and what comes out, and errors in words for everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.conformance.catalogue import check
from sequence_mixer.conformance.probes import Subject, why_unusable
from sequence_mixer.errors import (
    BackendError,
    DeviceError,
    DtypeError,
    MixerError,
    PackingError,
    ShapeError,
    StateError,
)


def served_dtypes(subject: Subject) -> list[torch.dtype]:
    """Dtypes that some declared backend serves on the subject's device."""
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    backends = subject.capabilities.backends
    return [kind for kind in kinds if any(why_unusable(spec, subject.device, kind) is None for spec in backends)]


@check("SM-1")
def check_output_has_the_shape_dtype_and_device_of_the_input(subject: Subject) -> None:
    """y is [B,T,D] in x's dtype and on x's device, in every dtype that a backend serves, and finite."""
    for dtype in served_dtypes(subject):
        at = subject.at(dtype)
        x = at.input(2, at.length(19))
        y = at.build()(x)
        subject.require(isinstance(y, Tensor), f"forward returned {type(y).__name__}, wanted one Tensor")
        came, wanted = (list(y.shape), y.dtype, y.device), (list(x.shape), x.dtype, x.device)
        subject.require(came == wanted, f"the input is {wanted}, the output {came}")
        subject.require(bool(y.isfinite().all()), f"the output in {dtype} is not finite")


@check("SM-1")
def check_float64_is_served(subject: Subject) -> None:
    """Some declared backend runs in float64 on every device."""
    subject.require(torch.float64 in served_dtypes(subject), "no declared backend serves float64")


@check("SM-1")
def check_rows_of_a_batch_are_independent(subject: Subject) -> None:
    """Changing one row of a batch leaves the other rows bit for bit alone."""
    mixer, x = subject.build(), subject.input(3, subject.length(24))
    changed = torch.cat([x[:1], subject.input(1, x.shape[1], seed=5, scale=10.0), x[2:]])
    before, after = mixer(x).detach(), mixer(changed).detach()
    for row in (0, 2):
        worst = float((before[row] - after[row]).abs().max())
        subject.require(worst == 0.0, f"changing row 1 of the batch changed row {row} by {worst:.2e}")


@check("SM-1")
def check_wrong_inputs_raise_in_words(subject: Subject) -> None:
    """A wrong shape, width, dtype or device raises the error of the contract, not whatever torch says."""
    mixer = subject.build()
    x = subject.input(2, subject.length(8))
    other = torch.float32 if subject.dtype == torch.float64 else torch.float64
    wrong = {
        "an input of two axes": (x[0], ShapeError),
        "a wrong width": (torch.cat([x, x[..., :1]], dim=-1), ShapeError),
        "whole numbers": (x.long(), DtypeError),
        "complex numbers": (x + 0j, DtypeError),
        f"{other} beside {subject.dtype} parameters": (x.to(other), DtypeError),
        "an input on another device": (x.to("meta"), DeviceError),
    }
    has_parameters = any(True for _ in mixer.parameters())
    for what, (value, kind) in wrong.items():
        if not has_parameters and ("beside" in what or "device" in what):
            continue
        must_raise(subject, what, kind, lambda value=value: mixer(value))
    mixer.backend = "no_such_backend"
    must_raise(subject, "a backend that does not exist", BackendError, lambda: mixer(x))


@check("SM-1")
def check_malformed_packing_and_padding_raise(subject: Subject) -> None:
    """Boundaries or masks of a wrong form, and both at once, raise PackingError where the capability is declared."""
    mixer, able = subject.build(), subject.capabilities
    one, two = subject.input(1, subject.length(8)), subject.input(2, subject.length(8))
    tokens = one.shape[1]
    good = torch.tensor([0, tokens], device=subject.device, dtype=torch.int32)
    mask = torch.ones(2, tokens, device=subject.device, dtype=torch.bool)
    if able.varlen:
        must_raise(subject, "packing with batch 2", PackingError, lambda: mixer(two, cu_seqlens=good))
        must_raise(subject, "float boundaries", PackingError, lambda: mixer(one, cu_seqlens=good.float()))
        if subject.device.type == "cpu":
            must_raise(subject, "boundaries beyond T", PackingError, lambda: mixer(one, cu_seqlens=good + 1))
    if able.padding_mask:
        must_raise(subject, "a mask of floats", PackingError, lambda: mixer(two, padding_mask=mask.float()))
        must_raise(subject, "a mask of a wrong shape", PackingError, lambda: mixer(two, padding_mask=mask[:1]))
        if subject.device.type == "cpu" and tokens >= 3:
            holed = mask.clone()
            holed[1, 1] = False
            must_raise(subject, "a mask with a hole", PackingError, lambda: mixer(two, padding_mask=holed))
    if able.varlen and able.padding_mask:
        both = {"cu_seqlens": good, "padding_mask": mask[:1]}
        must_raise(subject, "packing and padding at once", PackingError, lambda: mixer(one, **both))
    if able.stateful:
        state = mixer.initial_state(3)
        must_raise(subject, "a state of a wrong batch", StateError, lambda: mixer.extend(two, state))
        must_raise(subject, "a state that is no State", StateError, lambda: mixer.extend(two, (two,)))


def must_raise(subject: Subject, what: str, kind: type[MixerError], call: object) -> None:
    """Fail unless `call()` raises `kind` with a message."""
    assert callable(call)
    try:
        call()
    except kind as error:
        subject.require(bool(str(error)), f"{what} raised {kind.__name__} without a message")
    except Exception as error:
        subject.fail(f"{what} raised {type(error).__name__}, wanted {kind.__name__}: {error}")
    else:
        subject.fail(f"{what} was accepted, wanted {kind.__name__}")

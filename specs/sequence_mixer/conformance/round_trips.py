"""SM-11: a mixer survives being stored, copied and sent."""

from __future__ import annotations

import copy
import io
import pickle

import torch

from sequence_mixer.conformance.catalogue import check
from sequence_mixer.conformance.comparing import with_gradients
from sequence_mixer.conformance.probes import Subject
from sequence_mixer.conformance.purity import require_same, snapshot
from sequence_mixer.mixer import SequenceMixer


def require_same_function(subject: Subject, what: str, other: SequenceMixer, mixer: SequenceMixer) -> None:
    """Fail unless both have the same parameters and buffers and give the same outputs and gradients."""
    require_same(subject, what, snapshot(other), snapshot(mixer))
    x = subject.input(2, subject.length(13))
    want = with_gradients(subject, mixer, x, lambda m, value: m(value))
    require_same(subject, what, with_gradients(subject, other, x, lambda m, value: m(value)), want)


@check("SM-11")
def check_state_dict_round_trip(subject: Subject) -> None:
    """A mixer of another seed that loads the state dict (through torch.save) strictly is the same function."""
    mixer, other = subject.build(0), subject.build(1)
    stored = io.BytesIO()
    torch.save(mixer.state_dict(), stored)
    stored.seek(0)
    other.load_state_dict(torch.load(stored, weights_only=True), strict=True)
    require_same_function(subject, "load_state_dict", other, mixer)


@check("SM-11")
def check_deepcopy_and_pickle(subject: Subject) -> None:
    """copy.deepcopy and pickle give an independent mixer that is the same function, before and after a call."""
    mixer = subject.build()
    mixer(subject.input(1, subject.length(5)))
    for what, other in {
        "deepcopy": copy.deepcopy(mixer),
        "pickle": pickle.loads(pickle.dumps(mixer)),
    }.items():
        require_same_function(subject, what, other, mixer)
        subject.require(other.config == mixer.config, f"{what} changed the config")
        before = snapshot(mixer)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        require_same(subject, f"changing the {what} copy", snapshot(mixer), before)


@check("SM-11")
def check_the_same_seed_builds_the_same_mixer(subject: Subject) -> None:
    """Building is a function of the config and the seed; shapes and names do not depend on the seed."""
    one, two, other = (subject.built_raw(seed) for seed in (0, 0, 1))
    require_same(subject, "building twice from one seed", snapshot(two), snapshot(one))
    shapes = {name: list(tensor.shape) for name, tensor in snapshot(one).items()}
    others = {name: list(tensor.shape) for name, tensor in snapshot(other).items()}
    subject.require(shapes == others, "names or shapes of parameters depend on the seed")


@check("SM-11")
def check_a_mixer_is_built_from_its_dumped_config(subject: Subject) -> None:
    """make(config.model_validate(mixer.config.model_dump())) has the parameters of the mixer."""
    mixer = subject.built_raw()
    dumped = mixer.config.model_dump()
    subject.require(dumped.get("name") == subject.name, f"the dumped config is named {dumped.get('name')!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        again = subject.definition.make(subject.definition.config.model_validate(dumped))
    require_same(subject, "a mixer built from the dumped config", snapshot(again), snapshot(mixer))

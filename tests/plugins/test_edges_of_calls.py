"""Calls at the edge, over the registry: states of another mixer, no rows at all, no room."""

import pytest
import torch
import zoo
from torch import Tensor
from zoo.registry import registry

from layers import build, tokens
from sequence_mixer import State
from sequence_mixer.errors import ConfigError, DtypeError, ShapeError, StateError

STATEFUL = [name for name in registry.names() if registry.definition(name).capabilities.stateful]


class Strange(State):
    total: Tensor


@pytest.mark.parametrize("name", STATEFUL)
def test_the_state_of_another_mixer_is_refused(name: str) -> None:
    mixer = build(registry.definition(name))
    own = type(mixer.initial_state(1))
    assert mixer.state_type is own
    for length in (0, 1, 2):
        with pytest.raises(StateError, match=f"Strange, wanted the {own.__name__}"):
            mixer.extend(tokens(1, length), Strange(torch.zeros(1, 3)))


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_that_cannot_be_is_refused(name: str) -> None:
    mixer = build(registry.definition(name))
    with pytest.raises(ShapeError, match="capacity is -1"):
        mixer.initial_state(1, capacity=-1)
    with pytest.raises(DtypeError, match=r"dtype is torch\.int64"):
        mixer.initial_state(1, dtype=torch.int64)


@pytest.mark.parametrize("name", registry.names())
def test_a_batch_without_rows_gives_none(name: str) -> None:
    mixer = build(registry.definition(name))
    assert mixer(tokens(0, 5)).shape == (0, 5, 64)
    if mixer.capabilities.stateful:
        y, state = mixer.extend(tokens(0, 5), mixer.initial_state(0))
        assert (y.shape, state.batch_size) == ((0, 5, 64), 0)


def test_what_is_no_mixer_is_refused_in_words() -> None:
    for given in (None, 3, ["ssd"]):
        with pytest.raises(ConfigError, match="wanted a name, a mapping, a config, or a file's path"):
            zoo.create(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STATEFUL)
def test_states_are_joined_row_by_row_or_refused_in_words(name: str) -> None:
    mixer = build(registry.definition(name))
    small, large = mixer.initial_state(1, capacity=8), mixer.initial_state(2, capacity=64)
    assert small.concat(mixer.initial_state(3, capacity=8)).batch_size == 4
    sizes = [leaf.shape[1:] for leaf in small.leaves().values()]
    if sizes == [leaf.shape[1:] for leaf in large.leaves().values()]:
        assert small.concat(large).batch_size == 3
    else:
        with pytest.raises(StateError, match="give key/value states one capacity"):
            small.concat(large)
    with pytest.raises(StateError, match="the other state is Strange"):
        small.concat(Strange(torch.zeros(1, 3)))

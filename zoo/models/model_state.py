"""The decode state of a model: its layers' states, as one value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sequence_mixer.mixer import State


@dataclass(frozen=True, eq=False)
class ModelState:
    """States of all layers, in order. Has the methods of `State`; a value, as that is.

    layers: one State per layer, each with batch B.
    """

    layers: tuple[State, ...]

    def __iter__(self) -> Iterator[State]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> State:
        return self.layers[index]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves of all layers."""
        return sum(state.nbytes for state in self.layers)

    @property
    def batch_size(self) -> int:
        """Rows of the state, B or S."""
        return self.layers[0].batch_size

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """A state with `fn` applied to every leaf of every layer."""
        return type(self)(tuple(state.map(fn) for state in self.layers))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move all leaves to `device` and cast the floating ones to `dtype`."""
        return type(self)(tuple(state.to(device, dtype) for state in self.layers))

    def detach(self) -> Self:
        """The same values cut off from autograd."""
        return type(self)(tuple(state.detach() for state in self.layers))

    def index_select(self, batch: Tensor) -> Self:
        """Rows `batch` (int64 [B']) of every leaf: reorder, drop or repeat sequences (beam search)."""
        return type(self)(tuple(state.index_select(batch) for state in self.layers))

    def concat(self, other: Self) -> Self:
        """The rows of `self` followed by those of `other`."""
        return type(self)(tuple(a.concat(b) for a, b in zip(self.layers, other.layers, strict=True)))


pytree.register_pytree_node(
    ModelState,
    lambda state: (list(state.layers), None),
    lambda layers, context: ModelState(tuple(layers)),
    serialized_type_name="zoo.models.model_state.ModelState",
    flatten_with_keys_fn=lambda state: (
        [(pytree.SequenceKey(index), layer) for index, layer in enumerate(state.layers)],
        None,
    ),
)

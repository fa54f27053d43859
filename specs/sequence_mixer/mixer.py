"""The interface of a sequence mixer, and the values that pass through it: State, MatrixForm, Cost."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, dataclass_transform

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sequence_mixer.config import MixerConfig
from sequence_mixer.definition import Capabilities
from sequence_mixer.errors import (
    DeviceError,
    DtypeError,
    LengthError,
    MixerError,
    PackingError,
    ShapeError,
    StateError,
    UnsupportedCapability,
)
from sequence_mixer.packing import PaddingAsPacking
from sequence_mixer.shapes import checks_values, expect_cu_seqlens, expect_floating, expect_padding_mask

MATRIX_LIMIT_BYTES = 2 * 1024**3


@dataclass_transform(frozen_default=True, eq_default=False)
class State:
    """What a mixer carries from one piece of a sequence to the next: a value, never changed by `extend`.

    A subclass lists tensors as annotations and becomes a frozen dataclass and a pytree. Every leaf is a tensor with
    batch first (positions too, int64 [B]); no Python numbers, no complex numbers. Keeping a state is a snapshot,
    going back to it a rollback, using it twice a fork.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True, eq=False)(cls)
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]

        def flatten(state: State) -> tuple[list[Tensor], None]:
            return [getattr(state, name) for name in names], None

        def flatten_with_keys(state: State) -> tuple[list[tuple[Any, Tensor]], None]:
            return [(pytree.GetAttrKey(name), getattr(state, name)) for name in names], None

        pytree.register_pytree_node(
            cls,
            flatten,
            lambda leaves, context: cls(*leaves),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}.{id(cls)}",
            flatten_with_keys_fn=flatten_with_keys,
        )

    def leaves(self) -> dict[str, Tensor]:
        """Name -> tensor, in declaration order."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves, spare room of key/value buffers included."""
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves().values())

    @property
    def batch_size(self) -> int:
        """Rows of the state, B or S."""
        return next(iter(self.leaves().values())).shape[0]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """A state of the same type with `fn` applied to every leaf."""
        return type(self)(*[fn(leaf) for leaf in self.leaves().values()])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move all leaves to `device` and cast the floating ones to `dtype`."""
        return self.map(lambda leaf: leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None))

    def detach(self) -> Self:
        """The same values cut off from autograd."""
        return self.map(lambda leaf: leaf.detach())

    def index_select(self, batch: Tensor) -> Self:
        """Rows `batch` (int64 [B']) of every leaf: reorder, drop or repeat sequences (beam search)."""
        return self.map(lambda leaf: leaf.index_select(0, batch))

    def concat(self, other: Self) -> Self:
        """The rows of `self` followed by those of `other`. Raises StateError if their leaves differ in another size."""
        if type(other) is not type(self):
            raise StateError(f"the other state is {type(other).__name__}, wanted {type(self).__name__}")
        theirs = other.leaves()
        for name, leaf in self.leaves().items():
            if leaf.shape[1:] != theirs[name].shape[1:]:
                sizes = f"{list(leaf.shape)} and {list(theirs[name].shape)}"
                raise StateError(f"state.{name} is {sizes}; give key/value states one capacity in initial_state")
        return type(self)(*[torch.cat([leaf, theirs[name]]) for name, leaf in self.leaves().items()])


@dataclass(frozen=True)
class Factors:
    """Factors of a masked structure: M = mask o (left right^T) + diag(skip).

    mask: `mask(heads) -> [B,h,T,T]`, already causal. left, right: [B,T,H,R]. skip: [B,T,H] or None.
    """

    mask: Callable[[slice], Tensor]
    left: Tensor
    right: Tensor
    skip: Tensor | None = None


@dataclass(frozen=True)
class MatrixForm:
    """A mixer's output as a matrix product: y = finish(M values).

    build: `build(heads) -> [B,h,T,T]`, builds the matrices of a slice of heads; includes dt and the skip D.
    n_heads: H; one matrix per channel is H = channels, P = 1.
    values: [B,T,H,P], the tensor after every input-side operation.
    finish: [B,T,H,P] -> [B,T,D]: output gate, norm, projection, biases.
    factors: for the masked structures.
    """

    build: Callable[[slice], Tensor]
    n_heads: int
    values: Tensor
    finish: Callable[[Tensor], Tensor]
    factors: Factors | None = None

    def heads(self, which: slice) -> Tensor:
        """Matrices of some heads, [B,h,T,T]."""
        return self.build(which)

    @property
    def matrix(self) -> Tensor:
        """All matrices [B,H,T,T]. Raises MixerError above 2 GiB; take `heads(slice)` then."""
        batch, tokens = self.values.shape[:2]
        size = batch * self.n_heads * tokens * tokens * self.values.element_size()
        if size > MATRIX_LIMIT_BYTES:
            raise MixerError(
                f"the mixing matrices [{batch}, {self.n_heads}, {tokens}, {tokens}] take {size / 2**30:.1f} GiB, above "
                "the limit of 2 GiB; build some with heads(slice), or take a shorter input"
            )
        return self.build(slice(None))

    def apply(self) -> Tensor:
        """finish(M values), [B,T,D]; builds a few heads at a time."""
        batch, tokens = self.values.shape[:2]
        each = max(1, batch * tokens * tokens * self.values.element_size())
        step = max(1, min(self.n_heads, MATRIX_LIMIT_BYTES // 8 // each))
        mixed = []
        for start in range(0, self.n_heads, step):
            which = slice(start, min(start + step, self.n_heads))
            matrix = self.build(which)
            mixed.append(torch.einsum("bhts,bshp->bthp", matrix, self.values[:, :, which].to(matrix.dtype)))
        return self.finish(torch.cat(mixed, dim=2))


@dataclass(frozen=True)
class Cost:
    """What one forward call costs, by arithmetic.

    flops: matrix-product and convolution FLOPs, two per multiply-add, as torch's FLOP counter counts them.
    bytes: least bytes moved: parameters and inputs read once, outputs written once.
    parameters: number of parameter elements. state_elements: elements of the decode state after `length` tokens.
    """

    flops: int
    bytes: int
    parameters: int
    state_elements: int


class SequenceMixer(nn.Module):
    """Base of every mixer: [B,T,D] -> [B,T,D].

    A mixer implements `mix`, and as far as its capabilities go `empty_state`, `matrix_form` and `cost`. The public
    methods check their arguments against the contract and the capabilities, turn padding into packing (unless
    `pads_natively`), and call `mix`, so that `forward` and `extend` are the same computation.

    config: the config it was built from. capabilities: those of the config. backend: passed to every operator.
    state_type: the State of a stateful mixer; `extend` refuses any other.
    """

    pads_natively: ClassVar[bool] = False
    state_type: type[State] = State
    config: MixerConfig
    capabilities: Capabilities
    backend: str

    def __init__(self, config: MixerConfig, capabilities: Capabilities) -> None:
        super().__init__()
        self.config = config
        self.capabilities = capabilities
        self.backend = "auto"

    @property
    def name(self) -> str:
        """Name in the registry."""
        return self.config.name

    @abstractmethod
    def mix(
        self, x: Tensor, state: Any, *, cu_seqlens: Tensor | None, padding_mask: Tensor | None, donate: bool
    ) -> tuple[Tensor, Any]:
        """The computation behind `forward` and `extend`; arguments are checked already, T >= 1.

        state: None for a call of `forward`, which starts empty and drops the state that is returned.
        padding_mask: None unless the class says `pads_natively`.
        """

    def empty_state(self, batch_size: int, capacity: int | None, device: torch.device, dtype: torch.dtype) -> Any:
        """The state before the first token. Implemented by stateful mixers."""
        raise UnsupportedCapability(self.name, "stateful")

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """Mix whole sequences.

        x: [B,T,D], or packed [1,T,D] with `cu_seqlens`.
        cu_seqlens: int32 or int64 [S+1], boundaries of packed sequences; nothing crosses them.
        padding_mask: bool [B,T], True = real, one contiguous run per row; outputs at padded slots are 0.
        Returns [B,T,D] in x.dtype (the autocast dtype inside autocast).
        Raises ShapeError, DtypeError, DeviceError, LengthError, PackingError, UnsupportedCapability.
        """
        self._check_call(x, cu_seqlens, padding_mask)
        if 0 in x.shape[:2]:
            return torch.zeros_like(x)
        return self._mix(x, None, cu_seqlens, padding_mask, False)[0]

    def initial_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The state before the first token, for `batch_size` sequences.

        capacity: tokens to make room for in key/value buffers. device, dtype: the parameters' by default.
        Raises UnsupportedCapability if the mixer is not stateful, ShapeError, DtypeError.
        """
        self._require("stateful")
        if batch_size < 0:
            raise ShapeError(f"batch_size is {batch_size}, wanted 0 or more")
        if capacity is not None and capacity < 0:
            raise ShapeError(f"capacity is {capacity}, wanted 0 or more tokens, or None")
        if dtype is not None and not dtype.is_floating_point:
            raise DtypeError(f"dtype is {dtype}, wanted that of activations: a floating one")
        parameter = next(self.parameters(), None)
        if parameter is not None:
            device = parameter.device if device is None else device
            dtype = parameter.dtype if dtype is None else dtype
        return self.empty_state(batch_size, capacity, torch.device(device or "cpu"), dtype or torch.get_default_dtype())

    def extend(
        self,
        x: Tensor,
        state: Any,
        *,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        donate: bool = False,
    ) -> tuple[Tensor, Any]:
        """Mix the next tokens of sequences whose past is `state`.

        x, cu_seqlens, padding_mask: as in `forward`; the state has batch B (S with `cu_seqlens`).
        donate: give the old state up, so that buffers may be reused in place.
        Returns the outputs [B,T,D] and the state after the last real token. The old state stays valid unless donated.
        """
        self._require("stateful")
        self._check_call(x, cu_seqlens, padding_mask)
        if not isinstance(state, self.state_type):
            wanted = f"the {self.state_type.__name__} of this mixer's initial_state or extend"
            raise StateError(f"state is {type(state).__name__}, wanted {wanted}")
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        if state.batch_size != rows:
            raise StateError(f"the state has batch {state.batch_size}, the input has {rows} sequences")
        for name, leaf in state.leaves().items():
            if leaf.device != x.device:
                raise DeviceError(f"state.{name} is on {leaf.device}, x is on {x.device}; move one with .to(device)")
        if 0 in x.shape[:2]:
            return torch.zeros_like(x), state
        return self._mix(x, state, cu_seqlens, padding_mask, donate)

    def matrix_form(self, x: Tensor) -> MatrixForm:
        """The output as finish(M(x) v(x)). Raises UnsupportedCapability if not declared."""
        raise UnsupportedCapability(self.name, "matrix_form")

    @abstractmethod
    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        """Cost of `forward` on [batch_size, length, D] in `dtype`."""

    def parameter_groups(self) -> Mapping[str, dict[str, float]]:
        """Optimiser hints by parameter name: `weight_decay`, `lr_scale`. Parameters not named take the defaults."""
        return {}

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Called by the training loop after optimiser step `step`; random redraws use `generator`."""

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.config)

    def _mix(
        self, x: Tensor, state: Any, cu_seqlens: Tensor | None, padding_mask: Tensor | None, donate: bool
    ) -> tuple[Tensor, Any]:
        if padding_mask is None or self.pads_natively:
            return self.mix(x, state, cu_seqlens=cu_seqlens, padding_mask=padding_mask, donate=donate)
        packing = PaddingAsPacking(padding_mask)
        if state is not None:  # one more sequence holds the padded slots
            state = state.concat(state.map(lambda leaf: torch.zeros_like(leaf[:1])))
        y, after = self.mix(packing.pack(x), state, cu_seqlens=packing.cu_seqlens, padding_mask=None, donate=donate)
        return packing.unpack(y), None if after is None else after.map(lambda leaf: leaf[: x.shape[0]])

    def _require(self, capability: str) -> None:
        if not self.capabilities.has(capability):
            raise UnsupportedCapability(self.name, capability)

    def _check_call(self, x: Tensor, cu_seqlens: Tensor | None, padding_mask: Tensor | None) -> None:
        """Raise in words for whatever the contract or the capabilities refuse."""
        d_model = self.config.d_model
        if x.dim() != 3 or x.shape[2] != d_model:
            raise ShapeError(f"x has shape {list(x.shape)}, wanted [B, T, D={d_model}]")
        expect_floating("x", x)
        self._check_against_parameters(x)
        if cu_seqlens is not None and padding_mask is not None:
            raise PackingError("cu_seqlens and padding_mask came together; pass one: packing already has no padding")
        longest = x.shape[1]
        if cu_seqlens is not None:
            self._require("varlen")
            expect_cu_seqlens(cu_seqlens, x.shape[1], x.shape[0])
            # where values may not be looked at, T says nothing of the longest sequence; the mixer is left to notice
            longest = int(cu_seqlens.diff().max()) if checks_values(cu_seqlens) else 0
        if padding_mask is not None:
            self._require("padding_mask")
            expect_padding_mask(padding_mask, x.shape[0], x.shape[1])
        # asked only of configs that have the field: torch.compile cannot trace pydantic's answer for a missing one
        limit = getattr(self.config, "max_length", None) if self.capabilities.max_length else None
        if limit is not None and longest > limit:
            raise LengthError(f"{self.name}: the input has {longest} tokens, max_length is {limit}; build it longer")

    def _check_against_parameters(self, x: Tensor) -> None:
        dtypes: set[torch.dtype] = set()
        for parameter in self.parameters():
            if not dtypes and parameter.device != x.device:
                device = parameter.device
                raise DeviceError(
                    f"x is on {x.device}, the parameters of {self.name} are on {device}; move one of them"
                )
            if parameter.dtype == x.dtype:  # one of them is enough: a decode step should not walk through them all
                return
            dtypes.add(parameter.dtype)
        if dtypes and not torch.is_autocast_enabled(x.device.type):
            known = ", ".join(sorted(str(dtype) for dtype in dtypes))
            raise DtypeError(f"x is {x.dtype}, the parameters of {self.name} are {known}; cast one, or use autocast")

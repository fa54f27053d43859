"""Keys and values kept in a buffer with spare room, shared by the states of one lineage.

A state holds leaves `buffers` ([B,K,...] each: keys, values), and `positions` int64 [B], the real tokens of each row so
far. Slots 0 .. positions[b]-1 of row b are valid; K is the capacity; the rest is spare room and holds zeros wherever
this module allocated or copied it, so that a masked slot never brings in a NaN.

`append` adds T tokens and leaves the old state valid. Which way it goes:

- In place, into the spare room, when grad is off, nothing is being compiled, and the old state is the newest of its
  lineage. The new state gets views of its own on the same storage; older states never look at the slots written.
- By copying into a buffer of at least twice the size when the room is used up, and into one of the same size when the
  state is not the newest of its lineage (a fork or a rollback): the newer state keeps its slots.
- By a functional copy of exactly the slots needed when grad is on, so that autograd and old states stay right.
- By a functional copy of K + T slots under `torch.compile`, scattered at `positions` (fullgraph; no look at values).
- With `donate=True` the old state is given up: the buffers and `positions` themselves are changed and returned, at
  static shapes, so a CUDA graph can replay the step. The caller then masks by positions over the whole capacity
  (`valid_mask`). Outside capture and compilation a donated state that has no room left, or whose lineage has a newer
  state, is copied first; inside them it must have room and own its buffer. A donated step that autograd must follow
  is a functional copy.

Which state is the newest is known from a side table: the leaves of a state point weakly to a record that holds
`filled` (a Python int, upper bound of the slots used, so that nothing waits for the device), whether all rows are
uniform (positions equal to `filled`), and the lineage with the number of its newest state. Leaves that lost their
record (`.to`, `index_select`, a pickle, a map over the leaves), or whose positions were changed in place since, are
served by copying, at the price of reading `positions.max()` once; if such a state is donated, it is taken to own
its buffer.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sequence_mixer.errors import DtypeError, PackingError, ShapeError, StateError

LEAST_CAPACITY = 16


class Appended(NamedTuple):
    """Leaves after an append, and what is known of them without looking at values.

    buffers: [B,K,...] each. positions: int64 [B].
    filled: upper bound of the slots used, so that `buffer[:, :filled]` holds all; None if not known.
    uniform: True if it is known that every row has exactly `filled` tokens, so that no mask by positions is needed.
    """

    buffers: tuple[Tensor, ...]
    positions: Tensor
    filled: int | None
    uniform: bool


@dataclass
class _Lineage:
    """States that share storage. newest: serial number of the last one."""

    newest: int = 0


@dataclass(frozen=True)
class _Record:
    """What is known of one state. lineage is None if its storage must not be written to."""

    filled: int
    uniform: bool
    lineage: _Lineage | None
    serial: int = 0  # the state's number in its lineage
    version: int = 0  # of `positions`, when the record was made


@dataclass(frozen=True)
class _News:
    """New tokens, all rows in one.

    flat: [M,...] each. first: int64 [B], index in them of each row's first real token.
    lengths: int64 [B], real tokens of each row, or None if that is `most` everywhere. most: upper bound of them.
    """

    flat: tuple[Tensor, ...]
    first: Tensor
    lengths: Tensor | None
    most: int


_records: MutableMapping[Tensor, _Record] = WeakIdKeyDictionary()


def empty(
    batch_size: int,
    shapes: tuple[tuple[int, ...], ...],
    *,
    capacity: int = 0,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Buffers of zeros [B,capacity,*shape], one per shape, and positions of zeros int64 [B]."""
    with torch.inference_mode(False):
        buffers = tuple(torch.zeros(batch_size, capacity, *shape, dtype=dtype, device=device) for shape in shapes)
        positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
    if not torch.compiler.is_compiling():
        _remember(buffers, positions, 0, True, _Lineage())
    return buffers, positions


def append(
    buffers: tuple[Tensor, ...],
    positions: Tensor,
    news: tuple[Tensor, ...],
    new_lengths: Tensor | None = None,
    *,
    new_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    donate: bool = False,
) -> Appended:
    """Add tokens to the buffers; see the module for when this copies.

    buffers: [B,K,...] each. positions: int64 [B].
    news: [B,T,...] each, in the order and dtype of the buffers.
    new_lengths: int [B], real tokens of each row of `news`, all T by default; new_starts: int [B], index of the first
        of them (left padding), 0 by default. What stands in the other slots (NaN too) is never stored.
    cu_seqlens: int [B+1] if `news` are packed, [1,T,...]; then without new_lengths and new_starts.
    donate: give the old state up.
    Raises ShapeError, DtypeError, PackingError; StateError if there is no room where the capacity cannot change.
    """
    tokens = _check(buffers, positions, news, new_lengths, new_starts, cu_seqlens)
    compiling = torch.compiler.is_compiling()
    record = None if compiling else _recall(buffers, positions)
    if tokens == 0:
        filled, uniform = (record.filled, record.uniform) if record is not None else (None, False)
        return Appended(buffers, positions, filled, uniform)
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (*buffers, *news))
    if compiling:
        new = _flatten(positions, news, new_lengths, new_starts, cu_seqlens, tokens)
        if donate and not tracked:
            return _give_up(buffers, positions, new)
        return Appended(*_extended(buffers, positions, new, buffers[0].shape[1] + new.most), None, False)
    if positions.is_cuda and torch.cuda.is_current_stream_capturing():
        return _append_capturing(buffers, positions, news, new_lengths, new_starts, cu_seqlens, donate, tracked, record)
    if cu_seqlens is not None:
        tokens = int(cu_seqlens.diff().max())
    owned = _is_newest(record) if record is not None else donate and not _overlaps(buffers)
    if record is None:
        record = _Record(int(positions.max()) if positions.numel() else 0, False, _Lineage() if owned else None)
    elif not record.uniform and record.filled + tokens > buffers[0].shape[1]:  # the bound may be loose: look
        record = replace(record, filled=int(positions.max()))
    if torch.is_grad_enabled() and not (donate and not tracked):
        new = _flatten(positions, news, new_lengths, new_starts, cu_seqlens, tokens)
        return _append_functional(buffers, positions, news, new, record)
    with torch.inference_mode(False), torch.no_grad():  # leaves are never inference tensors: those refuse writes later
        new = _flatten(positions, news, new_lengths, new_starts, cu_seqlens, tokens)
        return _append_in_room(buffers, positions, news, new, record, owned, donate)


def valid_mask(positions: Tensor, capacity: int, tokens: int, *, new_starts: Tensor | None = None) -> Tensor:
    """Slots that each new query sees, bool [B,1,T,K]: those up to its own, aligned at the end of each row.

    positions: int64 [B], real tokens of each row BEFORE the new ones. capacity: K. tokens: T.
    new_starts: int [B], index of the first real new token of each row (left padding), 0 by default.
    """
    own = torch.arange(tokens, device=positions.device) + positions[:, None]
    if new_starts is not None:
        own = own - new_starts[:, None]
    return (torch.arange(capacity, device=positions.device) <= own[:, :, None]).unsqueeze(1)


class KeyValueBuffer:
    """The rule of this module under one name, for mixers that keep keys and values in their state."""

    empty = staticmethod(empty)
    append = staticmethod(append)
    valid_mask = staticmethod(valid_mask)


def _append_functional(
    buffers: tuple[Tensor, ...], positions: Tensor, news: tuple[Tensor, ...], new: _News, record: _Record
) -> Appended:
    """Grad is on: new tensors of exactly the slots needed, whose storage nothing will write to."""
    filled = record.filled + new.most
    uniform = record.uniform and new.lengths is None
    if uniform:
        pairs = zip(buffers, news, strict=True)
        after = tuple(torch.cat([old[:, : record.filled], add], 1) for old, add in pairs)
        after_positions = positions + new.most
    else:
        after, after_positions = _extended(buffers, positions, new, filled)
    _remember(after, after_positions, filled, uniform, None)
    return Appended(after, after_positions, filled, uniform)


def _append_in_room(
    buffers: tuple[Tensor, ...],
    positions: Tensor,
    news: tuple[Tensor, ...],
    new: _News,
    record: _Record,
    owned: bool,
    donate: bool,
) -> Appended:
    """Grad is off: write into spare room, after a copy where there is none or it belongs to another state."""
    capacity, filled = buffers[0].shape[1], record.filled + new.most
    uniform = record.uniform and new.lengths is None
    lineage = record.lineage
    writable = not any(leaf.is_inference() or leaf.requires_grad for leaf in (*buffers, positions))
    in_place = owned and writable and filled <= capacity
    if not in_place:
        room = capacity if filled <= capacity else max(2 * filled, LEAST_CAPACITY)
        buffers = tuple(_copied(buffer, positions, record, room) for buffer in buffers)
        lineage = _Lineage()
    elif not donate:
        buffers = tuple(buffer.view_as(buffer) for buffer in buffers)
    if record.uniform and new.lengths is None:
        for buffer, add in zip(buffers, news, strict=True):
            buffer[:, record.filled : filled].copy_(add)
    else:
        _write(buffers, positions, new)
    if donate and in_place:
        positions.add_(new.most if new.lengths is None else new.lengths)
    else:
        positions = positions + (new.most if new.lengths is None else new.lengths)
    assert lineage is not None
    lineage.newest += 1
    _remember(buffers, positions, filled, uniform, lineage)
    return Appended(buffers, positions, filled, uniform)


def _append_capturing(
    buffers: tuple[Tensor, ...],
    positions: Tensor,
    news: tuple[Tensor, ...],
    new_lengths: Tensor | None,
    new_starts: Tensor | None,
    cu_seqlens: Tensor | None,
    donate: bool,
    tracked: bool,
    record: _Record | None,
) -> Appended:
    """Inside a CUDA graph: what Python knows of the state is wrong after the first replay, so nothing is kept."""
    if not donate or tracked:
        raise StateError(
            "a step that is captured in a CUDA graph must give its key/value state up: pass donate=True, with grad off"
        )
    new = _flatten(positions, news, new_lengths, new_starts, cu_seqlens, news[0].shape[1])
    least = new.most if cu_seqlens is None else 0
    if record is not None and record.filled + least > buffers[0].shape[1]:
        raise StateError(
            f"the state has capacity {buffers[0].shape[1]} and {record.filled} slots used; a captured step cannot grow "
            f"it by {least}: build it with initial_state(capacity=...) large enough"
        )
    if record is not None and record.lineage is not None and not _is_newest(record):
        raise StateError("the state shares its buffer with a newer one; copy it before capturing (state.index_select)")
    for leaf in (*buffers, positions):
        _records.pop(leaf, None)
    return _give_up(buffers, positions, new)


def _give_up(buffers: tuple[Tensor, ...], positions: Tensor, new: _News) -> Appended:
    """Change the leaves themselves, at static shapes and without looking at values."""
    with torch.no_grad():
        _write(buffers, positions, new)
        positions.add_(new.most if new.lengths is None else new.lengths)
    return Appended(buffers, positions, None, False)


def _flatten(
    positions: Tensor,
    news: tuple[Tensor, ...],
    new_lengths: Tensor | None,
    new_starts: Tensor | None,
    cu_seqlens: Tensor | None,
    most: int,
) -> _News:
    flat = tuple(new.flatten(0, 1) for new in news)
    if cu_seqlens is not None:
        ends = cu_seqlens.to(torch.int64)
        return _News(flat, ends[:-1], ends[1:] - ends[:-1], most)
    first = torch.arange(positions.shape[0], device=positions.device) * news[0].shape[1]
    lengths = None if new_lengths is None else new_lengths.to(torch.int64)
    return _News(flat, first if new_starts is None else first + new_starts, lengths, most)


def _extended(
    buffers: tuple[Tensor, ...], positions: Tensor, new: _News, capacity: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    """New buffers [B,capacity,...]: old slots, then new tokens at each row's position, then zeros. Differentiable."""
    slot = torch.arange(capacity, device=positions.device)
    step = slot - positions[:, None]  # [B,capacity]: which new token stands in the slot, if any
    after = positions + (new.most if new.lengths is None else new.lengths)
    is_old, is_new = step < 0, (step >= 0) & (slot < after[:, None])
    out = []
    for buffer, flat in zip(buffers, new.flat, strict=True):
        source = (new.first[:, None] + step).clamp(0, flat.shape[0] - 1)
        kept = buffer[:, :capacity]
        if kept.shape[1] < capacity:
            spare = kept.new_zeros(kept.shape[0], capacity - kept.shape[1], *kept.shape[2:])
            kept = torch.cat([kept, spare], 1)
        added = flat.index_select(0, source.flatten()).view(*source.shape, *flat.shape[1:])
        wide = tuple(source.shape) + (1,) * (buffer.dim() - 2)
        out.append(torch.where(is_new.view(wide), added, torch.where(is_old.view(wide), kept, 0)))
    return tuple(out), after


def _write(buffers: tuple[Tensor, ...], positions: Tensor, new: _News) -> None:
    """Write the new tokens of each row to its next slots, in place.

    Steps beyond a row's length repeat its last token, so nothing but real tokens is written; a row without any writes
    back what is there.
    """
    batch = positions.shape[0]
    step = torch.arange(new.most, device=positions.device).expand(batch, -1)
    row = torch.arange(batch, device=positions.device)[:, None].expand(-1, new.most)
    real = None
    if new.lengths is not None:
        real = (new.lengths > 0)[:, None].expand(-1, new.most)
        step = torch.minimum(step, (new.lengths - 1).clamp(min=0)[:, None])
    slot = positions[:, None] + step
    for buffer, flat in zip(buffers, new.flat, strict=True):
        source = new.first[:, None] + step
        if real is None:
            buffer.index_put_((row, slot), flat[source])
            continue
        within = torch.where(real, slot, slot.clamp(max=buffer.shape[1] - 1))
        added = flat[source.clamp(max=flat.shape[0] - 1)]
        wide = tuple(step.shape) + (1,) * (buffer.dim() - 2)
        buffer.index_put_((row, within), torch.where(real.reshape(wide), added, buffer[row, within]))


def _copied(buffer: Tensor, positions: Tensor, record: _Record, capacity: int) -> Tensor:
    """A buffer of `capacity` slots with the valid slots of the old one, and zeros elsewhere."""
    out = torch.zeros((buffer.shape[0], capacity, *buffer.shape[2:]), dtype=buffer.dtype, device=buffer.device)
    valid = buffer[:, : record.filled]
    if not record.uniform:
        slots = torch.arange(record.filled, device=buffer.device) < positions[:, None]
        valid = torch.where(slots.view(*slots.shape, *[1] * (buffer.dim() - 2)), valid, 0)
    out[:, : record.filled].copy_(valid)
    return out


def _overlaps(buffers: tuple[Tensor, ...]) -> bool:
    """True if slots of a buffer may share memory with each other (an expanded tensor), so that it cannot be written."""
    return any(size > 1 and stride == 0 for buffer in buffers for size, stride in zip(buffer.shape, buffer.stride()))


def _is_newest(record: _Record) -> bool:
    return record.lineage is not None and record.lineage.newest == record.serial


def _remember(
    buffers: tuple[Tensor, ...], positions: Tensor, filled: int, uniform: bool, lineage: _Lineage | None
) -> None:
    leaves = (*buffers, positions)
    if any(leaf.is_inference() for leaf in leaves):
        return
    record = _Record(filled, uniform, lineage, 0 if lineage is None else lineage.newest, positions._version)
    for leaf in leaves:
        _records[leaf] = record


def _recall(buffers: tuple[Tensor, ...], positions: Tensor) -> _Record | None:
    """The record that all leaves share, if nothing has changed since it was made."""
    record: _Record | None = _records.get(positions)
    if record is None or any(_records.get(buffer) is not record for buffer in buffers):
        return None
    return record if record.version == positions._version else None


def _check(
    buffers: tuple[Tensor, ...],
    positions: Tensor,
    news: tuple[Tensor, ...],
    new_lengths: Tensor | None,
    new_starts: Tensor | None,
    cu_seqlens: Tensor | None,
) -> int:
    """Shapes and dtypes; returns T."""
    batch = positions.shape[0]
    if len(buffers) != len(news) or not buffers:
        raise ShapeError(f"there are {len(buffers)} buffers and {len(news)} new tensors; pass one for each")
    rows = 1 if cu_seqlens is not None else batch
    tokens = news[0].shape[1]
    for buffer, new in zip(buffers, news, strict=True):
        if buffer.shape[0] != batch or buffer.shape[1] != buffers[0].shape[1]:
            raise ShapeError(
                f"a buffer has shape {list(buffer.shape)}, wanted [B={batch}, K={buffers[0].shape[1]}, ...] as "
                "positions and the first buffer say"
            )
        if tuple(new.shape) != (rows, tokens, *buffer.shape[2:]):
            raise ShapeError(
                f"new tokens have shape {list(new.shape)}, wanted {[rows, tokens, *buffer.shape[2:]]} for a buffer "
                f"{list(buffer.shape)}"
            )
        if new.dtype != buffer.dtype:
            raise DtypeError(
                f"new tokens are {new.dtype}, the buffer is {buffer.dtype}; cast one (state.to(dtype=...))"
            )
    for name, value in (("new_lengths", new_lengths), ("new_starts", new_starts)):
        if value is not None and (cu_seqlens is not None or tuple(value.shape) != (batch,)):
            raise PackingError(f"{name} has shape {list(value.shape)}, wanted [B={batch}], and no cu_seqlens beside it")
    if new_starts is not None and new_lengths is None:
        raise PackingError("new_starts came without new_lengths; pass both")
    if cu_seqlens is not None and tuple(cu_seqlens.shape) != (batch + 1,):
        raise PackingError(f"cu_seqlens has shape {list(cu_seqlens.shape)}, wanted [B+1={batch + 1}]")
    return tokens

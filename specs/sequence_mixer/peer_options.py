"""A reference module's constructor arguments and weights: each is read, and reproduced or refused in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from sequence_mixer.config import MixerConfig
from sequence_mixer.errors import ReferenceMismatch, suggest

if TYPE_CHECKING:
    from torch import Tensor

_REQUIRED = object()
C = TypeVar("C", bound=MixerConfig)


class PeerOptions:
    """Constructor arguments of the reference module `peer`; `done` refuses those that nobody took."""

    def __init__(self, peer: str, config: Mapping[str, Any]) -> None:
        self.peer = peer
        self._left = dict(config)
        self._known: list[str] = []

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The argument `name`, or `default` if it was not given. Raises ReferenceMismatch if there is neither."""
        self._known.append(name)
        if name in self._left:
            return self._left.pop(name)
        if default is _REQUIRED:
            raise ReferenceMismatch(f"{self.peer}: its argument {name!r} is missing from the config")
        return default

    def nested(self, name: str) -> PeerOptions:
        """The arguments of a part, a mapping under `name`; empty if it is not there."""
        inner = self.take(name, None)
        if inner is not None and not isinstance(inner, Mapping):
            raise ReferenceMismatch(f"{self.peer}: {name!r} is {type(inner).__name__}, wanted a mapping of arguments")
        return PeerOptions(f"{self.peer}, {name}", inner or {})

    def expect(self, name: str, default: Any, *allowed: Any, why: str) -> Any:
        """Take an argument that is reproduced for some values only; `why` says what is missing for the others."""
        value = self.take(name, default)
        if not any(value is each or (type(value) is type(each) and value == each) for each in allowed):
            given = "" if value != default else ", its default,"
            wanted = " or ".join(map(repr, allowed))
            raise ReferenceMismatch(f"{self.peer}: {name}={value!r}{given} is not reproduced: {why}; wanted {wanted}")
        return value

    def ignore(self, *names: str) -> None:
        """Arguments that do not change what the module computes."""
        for name in names:
            self.take(name, None)

    def done(self) -> None:
        """Raise ReferenceMismatch if an argument is left."""
        for name in self._left:
            hint = suggest(name, self._known)
            raise ReferenceMismatch(
                f"{self.peer}: its argument {name!r} is not known{hint or ';'} known: {', '.join(sorted(self._known))}"
            )


def expect_weights(peer: str, state_dict: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """The weights `names`, in that order. Raises ReferenceMismatch if one is missing or there are others."""
    missing = [name for name in names if name not in state_dict]
    others = [name for name in state_dict if name not in names]
    if missing or others:
        told = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"not known: {', '.join(others)}"] * bool(others)
        raise ReferenceMismatch(f"{peer}: the state dict does not fit its config; {'; '.join(told)}")
    return [state_dict[name] for name in names]


def config_of(peer: str, kind: type[C], **fields: Any) -> C:
    """A config of ours from a peer's arguments. Raises ReferenceMismatch if they are none, such as an odd size."""
    try:
        return kind(**fields)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, each['loc']))} {each['msg']}".strip() for each in error.errors())
        raise ReferenceMismatch(f"{peer}: its arguments make no config of ours: {told}") from None


def read_attention_layer(
    options: PeerOptions, state_dict: Mapping[str, Tensor], attention: str
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The part of fast-transformers' AttentionLayer around its attention: four projections with biases.

    options: the arguments of AttentionLayer. attention: the class inside it.
    Returns d_model, n_heads and head_dim, and the weights as `in_proj` (rows of queries, keys, values) and `out_proj`.
    """
    import torch

    options.expect("attention", attention, attention, why=f"this reads AttentionLayer({attention})")
    d_model, heads = options.take("d_model"), options.take("n_heads")
    width = options.take("d_keys", None) or d_model // heads
    options.expect("d_values", None, None, width, why="keys and values have one width")
    options.expect("d_model_keys", None, None, d_model, why="queries, keys and values come from one input")
    options.ignore("event_dispatcher")
    options.done()
    parts = [f"{part}_projection.{kind}" for kind in ("weight", "bias") for part in ("query", "key", "value", "out")]
    weights = expect_weights(options.peer, state_dict, parts)
    return {"d_model": d_model, "n_heads": heads, "head_dim": width}, {
        "in_proj.weight": torch.cat(weights[:3]),
        "out_proj.weight": weights[3],
        "in_proj.bias": torch.cat(weights[4:7]),
        "out_proj.bias": weights[7],
    }

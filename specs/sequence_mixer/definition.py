"""What a mixer declares of itself: its definition, its capabilities, and the structure of its mixing matrix."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sequence_mixer.config import MixerConfig
from sequence_mixer.errors import ConfigError, suggest

if TYPE_CHECKING:
    from torch import Tensor

    from sequence_mixer.mixer import SequenceMixer


@dataclass(frozen=True)
class Dense:
    """No structure is promised."""


@dataclass(frozen=True)
class LowRank:
    """rank(M) <= rank, for the whole T x T matrix (or the secant matrix of a mixer that is not value-linear)."""

    rank: int


@dataclass(frozen=True)
class Toeplitz:
    """M_ij depends on i - j only, and not on the input."""


@dataclass(frozen=True)
class OneSemiseparable:
    """A mask of cumulative products: L_ij L_jk = L_ik for i >= j >= k, L_ii = 1."""


@dataclass(frozen=True)
class Semiseparable:
    """Every strictly lower block M[i:, :i] has rank <= rank."""

    rank: int


@dataclass(frozen=True)
class Masked:
    """M = mask o (left right^T) + diag(skip), the mask Toeplitz or one-semiseparable, left and right of width rank."""

    mask: Toeplitz | OneSemiseparable
    rank: int


@dataclass(frozen=True)
class RowStochastic:
    """Entries >= 0, rows sum to 1 (up to the mixer's eps)."""


Structure = Dense | LowRank | Toeplitz | Semiseparable | Masked | RowStochastic


@dataclass(frozen=True)
class BackendSpec:
    """One way a mixer (or an operator) can be computed.

    name: what `backend=` takes.
    devices: device types ("cpu", "cuda"), or ("*",).
    dtypes: names of the dtypes served.
    training: True if gradients are served.
    needs: packages that must be importable ("triton").
    """

    name: str
    devices: tuple[str, ...] = ("*",)
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    training: bool = True
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Capabilities:
    """What a mixer with a given config can do. The suite tests what is declared, and that the rest is refused.

    causal: output t depends on inputs up to t only.
    bidirectional: output t depends on inputs on both sides.
    stateful: `initial_state` and `extend` work.
    varlen: `cu_seqlens` works. padding_mask: `padding_mask` works.
    max_length: the config has a `max_length` beyond which inputs are refused.
    matrix_form: `matrix_form` works. value_linear: the output before `finish` is linear in the values.
    data_dependent: the mixing matrix depends on the input.
    structures: what holds of the mixing matrix. backends: how it can be computed, best first.
    """

    causal: bool = True
    bidirectional: bool = False
    stateful: bool = False
    varlen: bool = False
    padding_mask: bool = False
    max_length: bool = False
    matrix_form: bool = False
    value_linear: bool = True
    data_dependent: bool = True
    structures: tuple[Structure, ...] = (Dense(),)
    backends: tuple[BackendSpec, ...] = (BackendSpec("reference"),)

    def has(self, capability: str) -> bool:
        """True if the flag `capability` is declared. Raises ConfigError for a name that is no flag."""
        flags = [f.name for f in dataclasses.fields(self) if f.name not in ("structures", "backends")]
        if capability not in flags:
            raise ConfigError(f"no capability {capability!r}{suggest(capability, flags)}; flags: {', '.join(flags)}")
        return bool(getattr(self, capability))


@dataclass(frozen=True)
class MixerDef:
    """A registered mixer: everything the host, the suite and the tools know of it.

    name: name in the registry and in configs.
    config: the config class. build: `build(config, shared)`, or `build(config)` if nothing is shared between layers;
        `shared` is one mutable mapping for all layers of a model.
    capabilities: of the default config; computed from `capabilities_of` when that is given.
    capabilities_of: capabilities of a config; constant `capabilities` when not given.
    examples: small configs the suite runs, as keyword arguments of `config` ("default" required).
    source: paper and code. status: "stable" or "experimental".
    known_failures: id of a check -> reason; strict: a known failure that passes is an error.
    from_reference: converts a reference module: `(peer, its config, its state dict) -> (our config, our state dict)`.
        Raises ReferenceMismatch for an option that is not reproduced.
    """

    name: str
    config: type[MixerConfig]
    build: Callable[..., SequenceMixer]
    examples: Mapping[str, Mapping[str, Any]]
    capabilities: Capabilities = None  # type: ignore[assignment]  # None: computed in __post_init__
    capabilities_of: Callable[[Any], Capabilities] = None  # type: ignore[assignment]  # None: constant
    source: str = ""
    maintainer: str = ""
    status: str = "stable"
    known_failures: Mapping[str, str] = field(default_factory=dict)
    from_reference: (
        Callable[[str, Mapping[str, Any], Mapping[str, Tensor]], tuple[MixerConfig, dict[str, Tensor]]] | None
    ) = None

    def __post_init__(self) -> None:
        if "default" not in self.examples:
            raise ConfigError(f"mixer {self.name!r}: examples need the key 'default', got {', '.join(self.examples)}")
        given: tuple[object, object] = (self.capabilities, self.capabilities_of)
        if given == (None, None):
            raise ConfigError(f"mixer {self.name!r}: give capabilities or capabilities_of")
        if given[1] is None:
            constant = self.capabilities
            object.__setattr__(self, "capabilities_of", lambda config: constant)
        else:
            object.__setattr__(self, "capabilities", self.capabilities_of(self.example("default")))

    def example(self, key: str) -> MixerConfig:
        """The example config `key`, validated."""
        return self.config.model_validate({"name": self.name, **self.examples[key]})

    def make(self, config: MixerConfig, shared: MutableMapping[str, Any] | None = None) -> SequenceMixer:
        """Build a mixer; `shared` is passed on if `build` takes it."""
        takes = len([p for p in inspect.signature(self.build).parameters.values() if p.kind != p.KEYWORD_ONLY])
        if takes > 1:
            return self.build(config, {} if shared is None else shared)
        return self.build(config)

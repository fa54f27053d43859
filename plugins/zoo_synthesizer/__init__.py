"""Synthesizer: attention weights that are learned, or computed from one token, instead of compared between two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sequence_mixer import BackendSpec, Capabilities, Dense, MixerDef, RowStochastic, hookimpl
from zoo_synthesizer.config import SynthesizerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from sequence_mixer import SequenceMixer

KERNEL_WIDEST = 256  # channels of a value, of a query with all its parts, or of a factor, for the Triton kernels
DATA_INDEPENDENT = {"random", "factorised_random"}
NOT_A_PRODUCT = {"random", "factorised_dense"}  # parts that are no inner product of a query and a key


def backends_of(config: SynthesizerConfig) -> tuple[BackendSpec, ...]:
    """How a config can be computed, best first; inner products run on the kernels of softmax attention."""
    parts = set(config.parts)
    widths = {
        "dense": config.hidden + config.bias,
        "factorised_random": config.factor_rank,
        "vanilla": config.width,
    }
    inner = sum(width for part, width in widths.items() if part in parts)
    widest = max(config.width, inner, *(config.grid if "factorised_dense" in parts else ()))
    kernel = BackendSpec("triton", devices=("cuda",), dtypes=("float32", "bfloat16", "float16"), needs=("triton",))
    served = (kernel,) if widest <= KERNEL_WIDEST else ()
    library = () if parts & NOT_A_PRODUCT else (BackendSpec("sdpa"),)
    return (*library, *served, BackendSpec("chunked"), BackendSpec("reference"))


def capabilities_of(config: SynthesizerConfig) -> Capabilities:
    """A causal one decodes from the values it has seen; the matrix of random parts knows no input."""
    return Capabilities(
        causal=config.causal,
        bidirectional=not config.causal,
        stateful=config.causal,
        varlen=True,
        padding_mask=True,
        max_length=True,
        matrix_form=True,
        data_dependent=not set(config.parts) <= DATA_INDEPENDENT,
        structures=(Dense(), RowStochastic()),
        backends=backends_of(config),
    )


def _build(config: SynthesizerConfig) -> SequenceMixer:
    """The module of a config."""
    from zoo_synthesizer.mixer import SynthesizerMixer

    return SynthesizerMixer(config, capabilities_of(config))


def _from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[SynthesizerConfig, dict[str, Tensor]]:
    """Config and weights equal to a reference module; see `zoo_synthesizer.from_reference.convert`."""
    from zoo_synthesizer.from_reference import convert

    return convert(peer, config, state_dict)


_SMALL = {"d_model": 64, "n_heads": 4, "max_length": 128}

EXAMPLES: dict[str, dict[str, Any]] = {
    "default": {"d_model": 64, "max_length": 128},
    "dense_wide": {**_SMALL, "bias": True, "d_hidden": 24, "causal": False},
    "tied": {**_SMALL, "tied_w2": True, "max_length": 61, "bias": True},
    "random": {**_SMALL, "parts": ("random",)},
    "random_bidirectional": {**_SMALL, "parts": ("random",), "causal": False, "head_dim": 10},
    "random_fixed": {**_SMALL, "parts": ("random",), "fixed": True, "max_length": 53},
    "factorised_random": {**_SMALL, "parts": ("factorised_random",), "rank": 5},
    "factorised_dense": {**_SMALL, "parts": ("factorised_dense",), "max_length": 127},
    "factorised_dense_bidirectional": {
        **_SMALL, "parts": ("factorised_dense",), "causal": False, "factors": (9, 15), "bias": True,
    },
    "mixture": {**_SMALL, "parts": ("random", "vanilla")},
    "mixture_tied": {**_SMALL, "parts": ("dense", "vanilla"), "tied_w2": True},
    "mixture_of_all": {
        **_SMALL, "parts": ("factorised_random", "dense", "vanilla", "factorised_dense", "random"),
        "causal": False, "d_hidden": 8, "fixed": True, "max_length": 96,
    },
}  # fmt: skip


@hookimpl
def zoo_register_mixers() -> Sequence[MixerDef]:
    return [
        MixerDef(
            "synthesizer",
            config=SynthesizerConfig,
            build=_build,
            capabilities_of=capabilities_of,
            examples=EXAMPLES,
            source="Tay et al. 2021 (2005.00743); tensorflow/mesh synthetic_attention",
            maintainer="The Mixer Zoo authors",
            from_reference=_from_reference,
        )
    ]

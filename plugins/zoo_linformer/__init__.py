"""Linformer: softmax attention to keys and values that are projected along the length to a fixed number of rows."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from sequence_mixer import BackendSpec, Capabilities, LowRank, MixerDef, RowStochastic, hookimpl
from sequence_mixer.definition import Structure
from zoo_linformer.config import LinformerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from sequence_mixer import SequenceMixer

KERNEL_WIDEST, KERNEL_ROWS = 256, 1024  # channels of a head and projected keys, for the Triton kernels
KERNEL_TILE_BYTES = 64 * 1024  # projected keys of a head, for those of linformer_attention, in powers of two


def backends_of(config: LinformerConfig) -> tuple[BackendSpec, ...]:
    """How a config can be computed, best first."""
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    plain = [BackendSpec("chunked"), BackendSpec("reference")]
    if config.projection == "linear":
        tile = max(16, 1 << (config.projected - 1).bit_length()) * max(16, 1 << (config.width - 1).bit_length())
        sizes = {
            name: size
            for name, size in sizes.items()
            if tile * size <= KERNEL_TILE_BYTES and config.projected <= KERNEL_ROWS
        }
    else:  # attention to the windows is that of softmax_attention
        plain.insert(0, BackendSpec("sdpa"))
    if sizes and config.width <= KERNEL_WIDEST:
        plain.insert(0, BackendSpec("triton", devices=("cuda",), dtypes=tuple(sizes), needs=("triton",)))
    return tuple(plain)


def capabilities_of(config: LinformerConfig) -> Capabilities:
    """Sees both sides through R rows; there is no causal form and so no state."""
    structures: list[Structure] = [LowRank(config.projected)]
    if not config.learned:
        structures.append(RowStochastic())
    return Capabilities(
        causal=False,
        bidirectional=True,
        padding_mask=True,
        max_length=True,
        matrix_form=True,
        value_linear=config.projection != "max_pool",
        structures=tuple(structures),
        backends=backends_of(config),
    )


def _build(config: LinformerConfig, shared: MutableMapping[str, Any]) -> SequenceMixer:
    """The module of a config; `shared` holds the projection that layers share."""
    from zoo_linformer.mixer import LinformerMixer

    return LinformerMixer(config, capabilities_of(config), shared)


def _from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[LinformerConfig, dict[str, Tensor]]:
    """Config and weights equal to a reference module; see `zoo_linformer.from_reference.convert`."""
    from zoo_linformer.from_reference import convert

    return convert(peer, config, state_dict)


_SMALL = {"d_model": 64, "n_heads": 4, "max_length": 128}

EXAMPLES: dict[str, dict[str, Any]] = {
    "default": {"d_model": 64},
    "headwise": {**_SMALL, "rank": 16, "share": "headwise", "bias": True},
    "every_head": {**_SMALL, "rank": 12, "share": "none", "n_kv_heads": 2, "out_bias": False},
    "kv": {**_SMALL, "rank": 16, "share": "kv", "n_kv_heads": 1, "tie_values": True},
    "layerwise": {"d_model": 64, "n_heads": 3, "head_dim": 10, "max_length": 100, "rank": 24, "share": "layerwise"},
    "mean_pool": {**_SMALL, "rank": 16, "projection": "mean_pool", "n_kv_heads": 2},
    "max_pool": {**_SMALL, "rank": 24, "projection": "max_pool"},
    "convolution": {**_SMALL, "rank": 20, "projection": "convolution", "share": "headwise", "bias": True},
    "convolution_every_head": {**_SMALL, "rank": 16, "projection": "convolution", "share": "none"},
    "convolution_layerwise": {**_SMALL, "rank": 32, "projection": "convolution", "share": "layerwise"},
}


@hookimpl
def zoo_register_mixers() -> Sequence[MixerDef]:
    return [
        MixerDef(
            "linformer",
            config=LinformerConfig,
            build=_build,
            capabilities_of=capabilities_of,
            examples=EXAMPLES,
            source="Wang et al. 2020 (2006.04768); lucidrains/linformer LinformerSelfAttention",
            maintainer="The Mixer Zoo authors",
            from_reference=_from_reference,
        )
    ]

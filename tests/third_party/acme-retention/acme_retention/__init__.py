"""Retention, as a third party would ship it: one hook, one definition, nothing in the host knows of it."""

from collections.abc import Sequence
from typing import Literal

from sequence_mixer import BackendSpec, Capabilities, MixerConfig, MixerDef, SequenceMixer, hookimpl
from sequence_mixer.definition import Masked, OneSemiseparable, Semiseparable


class RetentionConfig(MixerConfig):
    """Linear attention whose state decays by 1 - 2^(-5-h) per token in head h (RetNet, equation 8)."""

    name: Literal["retention"] = "retention"
    n_heads: int = 4


def capabilities_of(config: RetentionConfig) -> Capabilities:
    width = config.d_model // config.n_heads
    return Capabilities(
        causal=True,
        stateful=True,
        varlen=True,
        padding_mask=True,
        matrix_form=True,
        structures=(Masked(OneSemiseparable(), width), Semiseparable(width)),
        backends=(BackendSpec("chunked"), BackendSpec("reference")),
    )


def build(config: RetentionConfig) -> SequenceMixer:
    from acme_retention.mixer import RetentionMixer

    return RetentionMixer(config, capabilities_of(config))


@hookimpl
def zoo_register_mixers() -> Sequence[MixerDef]:
    return [
        MixerDef(
            "retention",
            config=RetentionConfig,
            build=build,
            capabilities_of=capabilities_of,
            examples={"default": {"d_model": 64}, "one_head": {"d_model": 64, "n_heads": 1}},
            source="Sun et al. 2023, Retentive Network (2307.08621)",
            maintainer="acme",
        )
    ]

"""Options of the mixer `linformer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sequence_mixer.config import Count
from sequence_mixer.errors import UnsupportedCapability
from sequence_mixer.headed_config import HeadedConfig

USUAL_RANK = 256
NEVER_CAUSAL = (
    "a projected key mixes the tokens of the whole sequence, so that no mask over the projected keys can hide "
    "the future from a token"
)


class LinformerConfig(HeadedConfig):
    """Attention of H query heads to G key/value heads of P channels, projected along the length to R rows."""

    name: Literal["linformer"] = "linformer"
    max_length: Count = Field(1024, description="longest input; with rank it sizes the projections")
    rank: Count | None = Field(None, description="projected keys, R; min(256, max_length) if null")
    projection: Literal["linear", "mean_pool", "max_pool", "convolution"] = Field(
        "linear",
        description="along the length: learned matrices [R, max_length]; means or maxima of windows; windows times "
        "learned taps. Windows are ceil(max_length / R) tokens long, side by side",
    )
    share: Literal["none", "headwise", "kv", "layerwise"] | None = Field(
        None,
        description="which learned projections are one: none (each key head has two), headwise (two per layer), kv "
        "(one per layer, for keys and values), layerwise (one for the net); headwise if null; pooling learns none",
    )
    n_kv_heads: Count | None = Field(None, description="key/value heads, G, a divisor of H; H if null")
    tie_values: bool = Field(False, description="values are the keys: one input projection gives both")
    bias: bool = Field(False, description="bias in the input projection")
    out_bias: bool = Field(True, description="bias in the output projection")

    @property
    def kv_heads(self) -> int:
        """Key/value heads, G."""
        return self.n_kv_heads or self.heads

    @property
    def projected(self) -> int:
        """Rows of the projected keys at `max_length`, R."""
        rank = self.rank or min(USUAL_RANK, self.max_length)
        return rank if self.projection == "linear" else -(-self.max_length // -(-self.max_length // rank))

    @property
    def window(self) -> int:
        """Tokens of a window, of pooling and convolution."""
        return -(-self.max_length // (self.rank or min(USUAL_RANK, self.max_length)))

    @property
    def learned(self) -> bool:
        """True if the projection has weights."""
        return self.projection in ("linear", "convolution")

    @property
    def sharing(self) -> str:
        """`share`, or its default."""
        return self.share or "headwise"

    @model_validator(mode="before")
    @classmethod
    def _never_causal(cls, fields: Any) -> Any:
        """`causal` is no option: false says what is so, and true is refused with the reason."""
        if not isinstance(fields, Mapping) or not isinstance(fields.get("causal"), bool):
            return fields
        if fields["causal"]:
            raise UnsupportedCapability("linformer", "causal", NEVER_CAUSAL)
        return {name: value for name, value in fields.items() if name != "causal"}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"n_heads={self.heads} is not a multiple of n_kv_heads={self.kv_heads}")
        if not self.learned and self.share is not None:
            raise ValueError(f"share={self.share!r} needs weights to share, projection={self.projection!r} has none")
        if self.projection != "linear" and self.rank is not None and self.rank > self.max_length:
            raise ValueError(f"rank={self.rank} windows do not fit into max_length={self.max_length} tokens")
        return self

"""Options of the mixer `attention`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sequence_mixer.config import Count
from sequence_mixer.headed_config import HeadedConfig

USUAL_BASE = 10_000.0


class AttentionConfig(HeadedConfig):
    """Softmax attention with H query heads and G key/value heads of P channels (MHA: G = H, MQA: G = 1)."""

    name: Literal["attention"] = "attention"
    n_kv_heads: Count | None = Field(None, description="key/value heads, G, a divisor of H; H if null")
    causal: bool = Field(True, description="a token sees itself and earlier ones; false: all tokens")
    bias: bool = Field(False, description="biases in both projections")
    rope: Literal["none", "half", "interleaved"] = Field(
        "half", description="rotary positions: channel r is paired with r + P/2 (half), 2r with 2r + 1 (interleaved)"
    )
    rope_base: float = Field(
        USUAL_BASE, gt=1, allow_inf_nan=False, description="pair r turns by base^(-2r/P) per token"
    )
    scale: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="factor of the dot products; P^-1/2 if null"
    )

    @property
    def kv_heads(self) -> int:
        """Key/value heads, G."""
        return self.n_kv_heads or self.heads

    @model_validator(mode="after")
    def _groups_and_pairs_fit(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"n_heads={self.heads} is not a multiple of n_kv_heads={self.kv_heads}")
        if self.rope != "none" and self.width % 2:
            raise ValueError(f"rope={self.rope!r} turns pairs of channels, but head_dim={self.width} is odd")
        if self.rope == "none" and self.rope_base != USUAL_BASE:
            raise ValueError(f"rope_base={self.rope_base} would have no effect with rope='none'; leave it out")
        return self

"""Options of the mixer `attention`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sequence_mixer.config import Count, MixerConfig

USUAL_HEAD_DIM = 64


class AttentionConfig(MixerConfig):
    """Softmax attention with H query heads and G key/value heads of P channels (MHA: G = H, MQA: G = 1).

    The sizes that are not given follow from the others: see `heads`, `kv_heads` and `width`.
    """

    name: Literal["attention"] = "attention"
    n_heads: Count | None = Field(None, description="query heads, H; d_model // (head_dim or 64), at least 1, if null")
    n_kv_heads: Count | None = Field(None, description="key/value heads, G, a divisor of H; H if null")
    head_dim: Count | None = Field(None, description="channels per head, P; d_model / H if null")
    causal: bool = Field(True, description="a token sees itself and earlier ones; false: all tokens")
    bias: bool = Field(False, description="biases in both projections")
    rope: Literal["none", "half", "interleaved"] = Field(
        "half", description="rotary positions: channel r is paired with r + P/2 (half), 2r with 2r + 1 (interleaved)"
    )
    rope_base: float = Field(10_000.0, gt=1, allow_inf_nan=False, description="slowest rotation is 1 / base^((P-2)/P)")
    scale: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="factor of the dot products; P^-1/2 if null"
    )

    @property
    def heads(self) -> int:
        """Query heads, H."""
        return self.n_heads or max(1, self.d_model // (self.head_dim or USUAL_HEAD_DIM))

    @property
    def kv_heads(self) -> int:
        """Key/value heads, G."""
        return self.n_kv_heads or self.heads

    @property
    def width(self) -> int:
        """Channels of a head, P."""
        return self.head_dim or self.d_model // self.heads

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.head_dim is None and self.d_model % self.heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.heads}; set n_heads or head_dim")
        if self.heads % self.kv_heads:
            raise ValueError(f"n_heads={self.heads} is not a multiple of n_kv_heads={self.kv_heads}")
        if self.rope != "none" and self.width % 2:
            raise ValueError(f"rope={self.rope!r} rotates pairs of channels, but head_dim={self.width} is odd")
        return self

"""The options that mixers with heads share: how many heads there are, and how wide each is."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from sequence_mixer.config import Count, MixerConfig

USUAL_HEAD_DIM = 64


class HeadedConfig(MixerConfig):
    """H heads of P channels. Sizes that are not given follow from the others: read them from `heads` and `width`."""

    n_heads: Count | None = Field(None, description="heads, H; d_model // (head_dim or 64), at least 1, if null")
    head_dim: Count | None = Field(None, description="channels per head, P; d_model / H if null")

    @property
    def heads(self) -> int:
        """Heads, H."""
        return self.n_heads or max(1, self.d_model // (self.head_dim or USUAL_HEAD_DIM))

    @property
    def width(self) -> int:
        """Channels of a head, P."""
        return self.head_dim or self.d_model // self.heads

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.head_dim is None and self.d_model % self.heads:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of n_heads={self.heads}; set n_heads or head_dim"
            )
        return self

"""Options of the mixer `mlp_mixer`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sequence_mixer.config import Count, MixerConfig

NORM_EPS = 1e-6


class MlpMixerConfig(MixerConfig):
    """An MLP over the token axis with Ds hidden units, the same for every channel."""

    name: Literal["mlp_mixer"] = "mlp_mixer"
    max_length: Count = Field(1024, description="longest input, L; shorter ones use the first columns and rows")
    tokens_dim: Count | None = Field(
        None, description="hidden units, Ds; max(1, d_model // 2) if null, or L if causal, where it can be nothing else"
    )
    activation: Literal["gelu_tanh", "gelu_erf"] = Field(
        "gelu_tanh", description="GELU by its tanh approximation (flax, the original) or exact (torch, timm)"
    )
    causal: bool = Field(
        False, description="triangular weights: hidden unit s sees tokens up to s, and tokens from s on see it"
    )
    bias: bool = Field(True, description="biases of the hidden units and of the outputs")
    pre_norm: bool = Field(False, description="LayerNorm over channels in front, for a block that has none")
    norm_eps: float = Field(NORM_EPS, gt=0, allow_inf_nan=False, description="added to the variance under pre_norm")
    residual: bool = Field(False, description="add the input to the output, for a block that does not")

    @property
    def hidden(self) -> int:
        """Hidden units, Ds."""
        return self.tokens_dim or (self.max_length if self.causal else max(1, self.d_model // 2))

    @model_validator(mode="after")
    def _eps_needs_the_norm(self) -> Self:
        if not self.pre_norm and self.norm_eps != NORM_EPS:
            raise ValueError(f"norm_eps={self.norm_eps} would have no effect with pre_norm=False; leave it out")
        return self

    @model_validator(mode="after")
    def _triangles_are_square(self) -> Self:
        if self.causal and self.hidden != self.max_length:
            raise ValueError(
                f"causal weights are square: tokens_dim={self.tokens_dim} must be max_length={self.max_length}, or null"
            )
        return self

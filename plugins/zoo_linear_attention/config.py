"""Options of the mixer `linear_attention`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sequence_mixer.headed_config import HeadedConfig

USUAL_EPS = 1e-6


class LinearAttentionConfig(HeadedConfig):
    """Linear attention with H heads, whose keys and values have P channels each; the state width N is P."""

    name: Literal["linear_attention"] = "linear_attention"
    feature_map: Literal["identity", "elu_plus_one", "relu", "silu", "squared_relu"] = Field(
        "elu_plus_one", description="phi, applied to queries and keys channel by channel"
    )
    normalize: bool = Field(
        True, description="divide by the sum of the weights, which should then be positive: elu_plus_one"
    )
    eps: float = Field(
        USUAL_EPS, gt=0, allow_inf_nan=False, description="added to the sum of the weights under normalize"
    )
    scale: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="factor of <phi(q), phi(k)>; under normalize it only weighs eps"
    )
    causal: bool = Field(True, description="a token sees itself and earlier ones; false: all tokens")
    bias: bool = Field(False, description="biases in both projections")

    @model_validator(mode="after")
    def _eps_needs_the_sum(self) -> Self:
        if not self.normalize and self.eps != USUAL_EPS:
            raise ValueError(f"eps={self.eps} would have no effect with normalize=False; leave it out")
        return self

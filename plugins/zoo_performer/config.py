"""Options of the mixer `performer`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sequence_mixer.config import Count
from sequence_mixer.headed_config import HeadedConfig


class PerformerConfig(HeadedConfig):
    """FAVOR+ attention with H query heads and G key/value heads of P channels, through M random features."""

    name: Literal["performer"] = "performer"
    n_kv_heads: Count | None = Field(None, description="key/value heads, G, a divisor of H; H if null")
    n_features: Count = Field(256, description="rows of the random projection; hyperbolic features are twice as many")
    feature_map: Literal["positive", "hyperbolic", "relu"] = Field(
        "positive", description="exp(w x' - |x'|^2/2), the same with w and -w, or max(w x', 0)"
    )
    orthogonal: bool = Field(True, description="rows of the projection orthogonal in blocks of P; false: independent")
    projection_norms: Literal["chi", "sqrt"] = Field(
        "chi", description="norms of orthogonal rows: those of independent normal rows, or P^1/2 each"
    )
    redraw_interval: Count | None = Field(
        1000, description="optimiser steps after which the projection is drawn anew; never if null"
    )
    causal: bool = Field(True, description="a token sees itself and earlier ones; false: all tokens")
    bias: bool = Field(False, description="biases in both projections")
    out_bias: bool | None = Field(None, description="bias of the output projection; that of `bias` if null")
    eps: float = Field(0.0, ge=0, allow_inf_nan=False, description="added to the sum of weights")
    feature_eps: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="added to ReLU (1e-3 if null) or JAX-stabilised (1e-6) features"
    )
    key_eps: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="mass that each causal ReLU feature's normaliser starts with"
    )
    compat: Literal["jax"] | None = Field(None, description="the stabiliser of the JAX code; needs causal=false")

    @property
    def kv_heads(self) -> int:
        """Key/value heads, G."""
        return self.n_kv_heads or self.heads

    @property
    def features(self) -> int:
        """Features of a head, M."""
        return self.n_features * (2 if self.feature_map == "hyperbolic" else 1)

    @property
    def added_to_features(self) -> float:
        """`feature_eps` with its default filled in."""
        if self.feature_eps is not None:
            return self.feature_eps
        return 1e-3 if self.feature_map == "relu" else 1e-6 if self.compat == "jax" else 0.0

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"n_heads={self.heads} is not a multiple of n_kv_heads={self.kv_heads}")
        if self.projection_norms == "sqrt" and not self.orthogonal:
            raise ValueError("projection_norms='sqrt' would have no effect with orthogonal=False; leave it out")
        relu = self.feature_map == "relu"
        if self.compat == "jax" and self.causal:
            raise ValueError(
                "compat='jax' subtracts a maximum over all keys and adds feature_eps, so that future keys would change "
                "past outputs; set causal=false, or leave compat out"
            )
        if self.compat == "jax" and relu:
            raise ValueError("ReLU features have no stabiliser; leave compat='jax' out")
        if self.feature_eps and not relu and self.compat is None:
            raise ValueError(
                "feature_eps beside a running maximum would make weights depend on other tokens; it goes with "
                "feature_map='relu' or compat='jax'; use eps"
            )
        if self.key_eps and not (relu and self.causal):
            raise ValueError("key_eps goes with feature_map='relu' and causal=true; use eps")
        return self

"""Options of the mixer `synthesizer`."""

from __future__ import annotations

import math
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from sequence_mixer.config import Count
from sequence_mixer.headed_config import HeadedConfig

Part = Literal["dense", "random", "factorised_dense", "factorised_random", "vanilla"]
PARTS: tuple[str, ...] = get_args(Part)
USUAL_RANK = 8


class SynthesizerConfig(HeadedConfig):
    """Attention whose logits come without keys: from each token alone, or from no token at all.

    Options that only some parts have are null when those parts are absent; setting one then is refused.
    """

    name: Literal["synthesizer"] = "synthesizer"
    parts: tuple[Part, ...] = Field(
        ("dense",),
        min_length=1,
        description="where logits come from; several are mixed before the softmax, with weights on the simplex",
    )
    max_length: Count = Field(1024, description="longest sequence, L: the size of what is learned per position")
    causal: bool = Field(True, description="a token sees itself and earlier ones; false: all tokens")
    bias: bool = Field(False, description="biases in all projections and in both layers of the dense maps")
    d_hidden: Count | None = Field(
        None, description="hidden channels F of the dense maps, per head; head_dim if null (dense, factorised_dense)"
    )
    tied_w2: bool = Field(
        False,
        description="the last layer of `dense` is shared by the heads and its hidden layer is the relu of the head's "
        "query, the one of `vanilla` where that is a part, as in the authors' code (dense)",
    )
    factors: tuple[Count, Count] | None = Field(
        None, description="(a, b) with a b >= max_length; nearly square if null (factorised_dense)"
    )
    rank: Count | None = Field(None, description="width k of the two factors; 8 if null (factorised_random)")
    fixed: bool = Field(False, description="the learned logits stay as drawn (random, factorised_random)")

    @property
    def hidden(self) -> int:
        """Hidden channels of the dense maps, F."""
        return self.d_hidden or self.width

    @property
    def factor_rank(self) -> int:
        """Width of the factors of `factorised_random`, k."""
        return self.rank or USUAL_RANK

    @property
    def grid(self) -> tuple[int, int]:
        """(a, b): key j stands in row j // b and column j % b of the outer product of `factorised_dense`."""
        if self.factors is not None:
            return self.factors
        rows = math.isqrt(self.max_length - 1) + 1
        return rows, -(-self.max_length // rows)

    @property
    def shares_queries(self) -> bool:
        """True if `dense` takes its hidden layer from the queries of `vanilla`."""
        return self.tied_w2 and "vanilla" in self.parts

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if len(set(self.parts)) != len(self.parts):
            raise ValueError(f"parts={list(self.parts)} names a part twice; each can be there once")
        if self.parts == ("vanilla",):
            raise ValueError("parts=['vanilla'] alone is the mixer 'attention'; add another part, or use that")
        for option, value, parts in (
            ("d_hidden", self.d_hidden, ("dense", "factorised_dense")),
            ("tied_w2", self.tied_w2, ("dense",)),
            ("factors", self.factors, ("factorised_dense",)),
            ("rank", self.rank, ("factorised_random",)),
            ("fixed", self.fixed, ("random", "factorised_random")),
        ):
            if value and not set(parts) & set(self.parts):
                raise ValueError(f"{option}={value!r} says something of {' and '.join(parts)}, which is no part here")
        if self.tied_w2 and self.hidden != self.width:
            raise ValueError(
                f"tied_w2 takes queries as the hidden layer: d_hidden={self.hidden}, head_dim={self.width}"
            )
        if self.factors is not None and math.prod(self.factors) < self.max_length:
            raise ValueError(f"factors={list(self.factors)} cover {math.prod(self.factors)} keys of {self.max_length}")
        return self

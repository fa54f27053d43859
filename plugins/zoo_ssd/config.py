"""Config of the SSD mixer, the sizes that follow from it, and what a mixer of that config can do."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from sequence_mixer import (
    BackendSpec,
    Capabilities,
    Masked,
    MixerConfig,
    OneSemiseparable,
    Semiseparable,
)
from sequence_mixer.config import Count

NORM_EPS = 1e-5
KERNEL_WIDEST = 256  # channels and state channels of a head that the Triton scan keeps in registers
KERNEL_TAPS = 8  # taps that the Triton convolution unrolls
KERNEL_NORM_GROUP = 16384  # channels of a norm group that one Triton program holds


class SsdConfig(MixerConfig):
    """Options of Mamba-2's layer; E = expand * d_model is the expanded width, H = d_ssm / head_dim the heads."""

    name: Literal["ssd"] = "ssd"
    d_state: Count = Field(128, description="state channels per head, N")
    head_dim: Count = Field(64, description="channels per head, P")
    expand: Count = Field(2, description="expanded width over model width, E / D")
    n_groups: Count = Field(1, description="groups of heads that share B and C, G")
    d_conv: Count = Field(4, description="taps of the short convolution, W")
    d_ssm: Count | None = Field(None, description="channels through the SSM (None: all E); a gated MLP takes the rest")
    d_has_head_dim: bool = Field(False, description="skip D per channel instead of per head")
    rmsnorm: bool = Field(True, description="gated RMS norm before the output projection; False: the gate alone")
    norm_groups: Count | None = Field(None, description="groups of channels normalised apart (None: n_groups)")
    norm_before_gate: bool = Field(False, description="normalise, then gate; False: gate, then normalise")
    norm_eps: float = Field(NORM_EPS, gt=0, allow_inf_nan=False, description="added to the mean square in the norm")
    learnable_init_states: bool = Field(False, description="learn the state before the first token, [H,P,N]")
    bias: bool = Field(False, description="bias in both projections")
    conv_bias: bool = Field(True, description="bias in the short convolution")
    conv_init: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="taps drawn from U(-conv_init, conv_init); None: torch's default",
    )
    dt_min: float = Field(0.001, gt=0, allow_inf_nan=False, description="smallest time step at initialisation")
    dt_max: float = Field(0.1, gt=0, allow_inf_nan=False, description="largest time step at initialisation")
    dt_init_floor: float = Field(1e-4, ge=0, allow_inf_nan=False, description="floor under the initial time steps")
    dt_limit: tuple[float, float] = Field((0.0, math.inf), description="smallest and largest time step, always")
    a_init_range: tuple[float, float] = Field((1.0, 16.0), description="range of the initial decay rates -A")

    @model_validator(mode="after")
    def _channels_divide(self) -> SsdConfig:
        expanded = self.expand * self.d_model
        said = "expand * d_model" if self.d_ssm is None else "d_ssm"
        if self.ssm_channels > expanded:
            raise ValueError(f"d_ssm={self.d_ssm} is more than the expanded width expand * d_model = {expanded}")
        if self.ssm_channels % self.head_dim:
            raise ValueError(f"{said} = {self.ssm_channels} is not a multiple of head_dim={self.head_dim}")
        if self.n_heads % self.n_groups:
            raise ValueError(f"the {self.n_heads} heads do not divide into n_groups={self.n_groups} equal groups")
        if self.rmsnorm and self.ssm_channels % self.norm_parts:
            raise ValueError(f"norm_groups={self.norm_groups} does not divide {said} = {self.ssm_channels}")
        return self

    @model_validator(mode="after")
    def _norm_options_need_the_norm(self) -> SsdConfig:
        if not self.rmsnorm:
            unused = [
                name
                for name, default in (("norm_groups", None), ("norm_before_gate", False), ("norm_eps", NORM_EPS))
                if getattr(self, name) != default
            ]
            if unused:
                raise ValueError(f"{', '.join(unused)} would have no effect with rmsnorm=False; leave it out")
        return self

    @model_validator(mode="after")
    def _ranges_rise(self) -> SsdConfig:
        low, high = self.dt_limit
        if not (0 <= low <= high and high > 0 and math.isfinite(low)):
            raise ValueError(f"dt_limit={self.dt_limit}, wanted 0 <= smallest <= largest, largest above 0")
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} is above dt_max={self.dt_max}")
        slow, fast = self.a_init_range
        if not (0 < slow <= fast and math.isfinite(fast)):
            raise ValueError(f"a_init_range={self.a_init_range}, wanted 0 < smallest <= largest, both finite")
        return self

    @property
    def ssm_channels(self) -> int:
        """Channels that go through the SSM, H P."""
        return self.expand * self.d_model if self.d_ssm is None else self.d_ssm

    @property
    def mlp_channels(self) -> int:
        """Channels that go through the gated MLP instead, E - H P."""
        return self.expand * self.d_model - self.ssm_channels

    @property
    def n_heads(self) -> int:
        """H."""
        return self.ssm_channels // self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the short convolution: x, B and C, H P + 2 G N."""
        return self.ssm_channels + 2 * self.n_groups * self.d_state

    @property
    def projected_channels(self) -> int:
        """Output channels of the input projection: two of the MLP, gate, x, B, C, time steps."""
        return 2 * self.mlp_channels + self.ssm_channels + self.conv_channels + self.n_heads

    @property
    def norm_parts(self) -> int:
        """Groups of channels with a root mean square of their own."""
        return self.n_groups if self.norm_groups is None else self.norm_groups


def capabilities_of(config: SsdConfig) -> Capabilities:
    """What an SSD mixer of this config can do."""
    backends = [BackendSpec("chunked"), BackendSpec("reference")]
    group = config.ssm_channels // config.norm_parts if config.rmsnorm else 0
    fits = max(config.d_state, config.head_dim) <= KERNEL_WIDEST and config.d_conv <= KERNEL_TAPS
    if fits and group <= KERNEL_NORM_GROUP:
        dtypes = ("float32", "bfloat16", "float16")
        backends.insert(0, BackendSpec("triton", devices=("cuda",), dtypes=dtypes, needs=("triton",)))
    return Capabilities(
        causal=True,
        stateful=True,
        varlen=True,
        padding_mask=True,
        matrix_form=True,
        value_linear=True,
        data_dependent=True,
        structures=(Masked(OneSemiseparable(), config.d_state), Semiseparable(config.d_state)),
        backends=tuple(backends),
    )

"""Config of the Mamba-1 mixer, the sizes that follow from it, and what a mixer of that config can do."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sequence_mixer import BackendSpec, Capabilities, MixerConfig, Semiseparable
from sequence_mixer.config import Count

KERNEL_WIDEST = 256  # states of a channel that the Triton scan keeps in registers
KERNEL_TAPS = 8  # taps that the Triton convolution unrolls
CHANNELS_PER_RANK = 16  # model channels for each channel of the time steps' projection, if dt_rank is "auto"


class MambaConfig(MixerConfig):
    """Options of Mamba-1's layer; E = expand * d_model is the expanded width."""

    name: Literal["mamba"] = "mamba"
    d_state: Count = Field(16, description="states of each channel, N")
    d_conv: Count = Field(4, description="taps of the short convolution, W")
    expand: Count = Field(2, description="expanded width over model width, E / D")
    dt_rank: Count | Literal["auto"] = Field(
        "auto", description="channels that the time steps are projected from, R; auto: d_model / 16, rounded up"
    )
    dt_min: float = Field(0.001, gt=0, allow_inf_nan=False, description="smallest time step at initialisation")
    dt_max: float = Field(0.1, gt=0, allow_inf_nan=False, description="largest time step at initialisation")
    dt_init: Literal["random", "constant"] = Field(
        "random", description="weights of dt_proj at initialisation: U(-s, s) or s, s = dt_scale / sqrt(R)"
    )
    dt_scale: float = Field(1.0, gt=0, allow_inf_nan=False, description="scale of the weights of dt_proj at first")
    dt_init_floor: float = Field(1e-4, ge=0, allow_inf_nan=False, description="floor under the initial time steps")
    conv_bias: bool = Field(True, description="bias in the short convolution")
    bias: bool = Field(False, description="bias in the projections into and out of the layer")

    @model_validator(mode="after")
    def _steps_rise(self) -> MambaConfig:
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} is above dt_max={self.dt_max}")
        return self

    @property
    def channels(self) -> int:
        """Expanded width, E."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """Channels that the time steps are projected from, R."""
        return -(-self.d_model // CHANNELS_PER_RANK) if self.dt_rank == "auto" else self.dt_rank


def capabilities_of(config: MambaConfig) -> Capabilities:
    """What a Mamba-1 mixer of this config can do."""
    backends = [BackendSpec("chunked"), BackendSpec("reference")]
    if config.d_state <= KERNEL_WIDEST and config.d_conv <= KERNEL_TAPS:
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
        structures=(Semiseparable(config.d_state),),
        backends=tuple(backends),
    )

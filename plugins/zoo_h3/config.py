"""Config of the H3 mixer, and what a mixer of that config can do."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sequence_mixer import BackendSpec, Capabilities, Masked, MixerConfig, Semiseparable, Toeplitz
from sequence_mixer.config import Count
from sequence_mixer.errors import unknown_name

KERNEL_WIDEST = 128  # channels of a head that the Triton kernels hold
KERNEL_MODES = 128  # modes of a head of one channel that they hold
KERNEL_TAPS = 256  # taps that the Triton convolution loops over
INITS = ("lin", "inv", "inv2", "quad", "legs", "real", "rand")


class H3Config(MixerConfig):
    """Options of H3; H = d_model / head_dim heads, each with one diagonal state space of N real state channels."""

    name: Literal["h3"] = "h3"
    d_state: Count = Field(64, description="real state channels of the diagonal SSM, N; even: N/2 complex modes")
    d_conv: Count | None = Field(None, description="taps of the shift SSM, W; d_state if null")
    head_dim: Count = Field(1, description="channels of a head, P; the state of a head is N P^2 numbers")
    n_ssm: Count | None = Field(None, description="distinct (A, B) pairs, dealt out to the heads in turn; H if null")
    init: str = Field(
        "lin",
        description="initial modes: lin, inv, inv2, quad, legs, real, rand, or several joined by +, in equal parts",
    )
    disc: Literal["bilinear", "zoh"] = Field("bilinear", description="discretisation: bilinear or zero-order hold")
    real_transform: Literal["exp", "softplus", "sigmoid", "relu", "none"] = Field(
        "exp", description="Re A = -f(parameter); none leaves the sign free"
    )
    dt_min: float = Field(0.001, gt=0, allow_inf_nan=False, description="smallest time step at initialisation")
    dt_max: float = Field(0.1, gt=0, allow_inf_nan=False, description="largest time step at initialisation")
    ssm_lr_scale: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="learning rate factor hinted for time steps, A and B"
    )
    max_length: Count | None = Field(None, description="longest input of one call; no limit if null")
    bias: bool = Field(True, description="biases in the projections")

    @property
    def heads(self) -> int:
        """H."""
        return self.d_model // self.head_dim

    @property
    def modes(self) -> int:
        """Complex modes of a head, M = N / 2."""
        return self.d_state // 2

    @property
    def ssms(self) -> int:
        """Distinct (A, B) pairs."""
        return self.n_ssm or self.heads

    @property
    def inits(self) -> list[str]:
        """Names in `init`."""
        return self.init.split("+")

    @property
    def taps(self) -> int:
        """Taps of the shift SSM, W."""
        return self.d_conv or self.d_state

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.d_model % self.head_dim:
            raise ValueError(f"d_model={self.d_model} is not a multiple of head_dim={self.head_dim}")
        if self.d_state % 2:
            raise ValueError(f"d_state={self.d_state} is odd; modes are conjugate pairs, two state channels each")
        if self.heads % self.ssms:
            raise ValueError(f"n_ssm={self.n_ssm} does not divide the {self.heads} heads")
        for each in self.inits:
            if each not in INITS:
                raise ValueError(unknown_name("init", each, INITS))
        if self.ssms % len(self.inits):
            raise ValueError(
                f"init={self.init!r} names {len(self.inits)} families, which {self.ssms} SSMs do not share"
            )
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} is above dt_max={self.dt_max}")
        return self


def capabilities_of(config: H3Config) -> Capabilities:
    """What an H3 mixer of this config can do."""
    backends = [BackendSpec("chunked"), BackendSpec("fft"), BackendSpec("reference")]
    holds = config.modes <= KERNEL_MODES if config.head_dim == 1 else config.head_dim <= KERNEL_WIDEST
    if holds and config.taps <= KERNEL_TAPS:
        kernel = BackendSpec("triton", devices=("cuda",), dtypes=("float32", "bfloat16", "float16"), needs=("triton",))
        backends.insert(0, kernel)
    return Capabilities(
        causal=True,
        stateful=True,
        varlen=True,
        padding_mask=True,
        max_length=config.max_length is not None,
        matrix_form=True,
        structures=(Masked(Toeplitz(), config.head_dim), Semiseparable(config.head_dim * config.d_state)),
        backends=tuple(backends),
    )

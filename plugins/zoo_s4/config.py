"""Options of the mixers `s4` and `s4d`, and what a mixer of such a config can do."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sequence_mixer import BackendSpec, Capabilities, MixerConfig, Semiseparable, Toeplitz
from sequence_mixer.config import Count
from sequence_mixer.definition import Structure

MEASURES = {  # HiPPO measures and the rank of their correction
    "legs": 1, "legsd": 0, "legt": 2, "lmu": 2, "lagt": 1, "tlagt": 1, "glagt": 1, "fout": 1, "fourier2": 1,
    "fourier_decay": 1, "foud": 0,
}  # fmt: skip
DIAGONALS = ("lin", "inv", "inv2", "quad", "real", "rand")
TRANSFORMS = ("exp", "softplus", "relu", "sigmoid", "none")
Transform = Literal["exp", "softplus", "relu", "sigmoid", "none"]
InputWeights = Literal["constant", "random", "alternating", "unit-cw", "unit-ccw"]
WIDEST_RANK = 3
MOST_MODES = 128  # modes of a channel that the Triton scan holds in registers
MOST_SUMS = 64  # Cauchy sums over the same poles that one Triton program adds up


class StateSpaceConfig(MixerConfig):
    """What `s4` and `s4d` share: D channels, each with `channels` readouts of a state of N numbers."""

    d_state: Count = Field(64, description="real numbers of a channel's state, N")
    channels: Count = Field(1, description="readouts of every state, each with a kernel and a skip of its own")
    n_ssm: Count | None = Field(None, description="independent systems (A, B), shared by channels in turn; None: D")
    causal: bool = Field(True, description="a token sees itself and earlier ones; False: a second kernel looks ahead")
    init: str = Field("legs", description="initial systems, one name or several joined by +, which share n_ssm equally")
    real_scale: float = Field(1.0, gt=0, allow_inf_nan=False, description="factor of Re A of diagonals in init")
    imag_scale: float = Field(1.0, gt=0, allow_inf_nan=False, description="factor of Im A of diagonals in init")
    real_random: bool = Field(False, description="-Re A of diagonals uniform in [0,1], of real in [0,N/2]")
    imag_random: bool = Field(False, description="pairs of lin, inv, inv2, quad uniform in [0,N/2]")
    b_init: InputWeights = Field("constant", description="B of diagonals in init: 1, normal, +-1, e^(-+2 pi i n/N)")
    b_scale: float = Field(1.0, gt=0, allow_inf_nan=False, description="factor of B of diagonals in init")
    normalize: bool = Field(False, description="scale B of diagonals in init to kernels whose sum has variance 1")
    dt_min: float = Field(0.001, gt=0, allow_inf_nan=False, description="smallest time step at initialisation")
    dt_max: float = Field(0.1, gt=0, allow_inf_nan=False, description="largest time step at initialisation")
    tie_dt: bool = Field(True, description="one time step for all states of a channel; False: one for each pair")
    dt_transform: Transform = Field("exp", description="time step from its parameter")
    real_transform: Transform = Field("exp", description="-Re A from its parameter")
    imag_transform: Transform = Field("none", description="-Im A from its parameter")
    activation: Literal["gelu", "silu", "relu", "none"] = Field("gelu", description="after the convolution")
    output: Literal["glu", "linear", "none"] = Field("glu", description="what mixes channels: a gated linear map, one")
    bias: bool = Field(True, description="bias of the output map")
    ssm_lr_scale: float = Field(
        0.25, gt=0, allow_inf_nan=False, description="hint: learning rate of time steps, A, B and P over that of others"
    )
    max_length: Count | None = Field(None, description="most tokens of a call; None: any number")

    @property
    def systems(self) -> int:
        """Independent systems, S."""
        return self.n_ssm or self.d_model

    @property
    def pairs(self) -> int:
        """Conjugate pairs of a state, N/2."""
        return self.d_state // 2

    @property
    def kernels(self) -> int:
        """Kernels of a channel: `channels`, twice if one looks ahead."""
        return self.channels if self.causal else 2 * self.channels

    @property
    def inits(self) -> list[str]:
        """Names in `init`."""
        return self.init.split("+")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.d_model % self.systems:
            raise ValueError(f"n_ssm={self.n_ssm} does not divide d_model={self.d_model}")
        if self.systems % len(self.inits):
            raise ValueError(f"init={self.init!r} names {len(self.inits)} systems, which do not divide {self.systems}")
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} is above dt_max={self.dt_max}")
        return self

    @model_validator(mode="after")
    def _draw_fits(self) -> Self:
        diagonals, turning = DIAGONALS, tuple(name for name in DIAGONALS if name != "real")
        by_pair = tuple(name for name in turning if name != "rand")
        shaping = dict.fromkeys(("real_scale", "real_random", "b_init", "b_scale", "normalize", "p_scale"), diagonals)
        fields = type(self).model_fields
        for field, shaped in (shaping | {"imag_scale": turning, "imag_random": by_pair}).items():
            changed = field in fields and getattr(self, field) != fields[field].default
            if changed and not set(shaped) & set(self.inits):
                raise ValueError(
                    f"{field}={getattr(self, field)!r} would have no effect on init={self.init!r}; "
                    f"it shapes {', '.join(shaped)}"
                )
        return self

    @model_validator(mode="after")
    def _output_fits(self) -> Self:
        if self.output == "none" and self.channels > 1:
            raise ValueError(f"channels={self.channels} need an output map back to d_model; output='none' has none")
        if self.output == "none" and not self.bias:
            raise ValueError("bias=False would have no effect with output='none'; leave it out")
        return self


class S4dConfig(StateSpaceConfig):
    """S4D: a diagonal state matrix."""

    name: Literal["s4d"] = "s4d"
    disc: Literal["zoh", "bilinear"] = Field("zoh", description="discretisation: zero-order hold or bilinear")
    use_b: bool = Field(True, description="learn B; False: B = 1, and C stands for both (minimal S4D)")
    real: bool = Field(False, description="d_state real modes instead of d_state / 2 complex pairs; with init='real'")
    bandlimit: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="modes of more than bandlimit / 2 cycles per token are left out"
    )

    @property
    def pairs(self) -> int:
        """Modes of a state: N/2 pairs, or N real ones."""
        return self.d_state if self.real else self.d_state // 2

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        _expect_inits(self, DIAGONALS + tuple(MEASURES))
        if self.d_state % 2 and not self.real:
            raise ValueError(f"d_state={self.d_state} is odd; states are conjugate pairs unless real=True")
        if self.real and self.bandlimit is not None:
            raise ValueError("bandlimit would have no effect with real=True, whose modes do not turn; leave it out")
        if self.real and self.imag_transform != "none":
            raise ValueError("imag_transform would have no effect with real=True; leave it out")
        if self.real and self.b_init.startswith("unit"):
            raise ValueError(f"b_init={self.b_init!r} turns, and modes of real=True do not; wanted another")
        for field, plain in (("b_init", "constant"), ("b_scale", 1.0), ("normalize", False)):
            if not self.use_b and getattr(self, field) != plain:
                raise ValueError(f"{field} would have no effect with use_b=False; leave it out")
        if self.real and set(self.inits) != {"real"}:
            raise ValueError(
                f"real=True drops frequencies, without which the modes of init={self.init!r} are all alike; "
                "wanted init='real'"
            )
        return self


class S4Config(StateSpaceConfig):
    """S4: a diagonal plus low-rank state matrix."""

    name: Literal["s4"] = "s4"
    rank: Count = Field(1, le=WIDEST_RANK, description="rank of the correction P, 1 to 3; legt and lmu need 2")
    p_scale: float = Field(1.0, ge=0, allow_inf_nan=False, description="factor of the random P of diagonals in init")
    kernel_length: Count = Field(
        1024, description="tokens that C is scaled for (C (I - A^L)), and whose kernel is computed at a time"
    )

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        _expect_inits(self, tuple(MEASURES) + DIAGONALS)
        if self.d_state % 2:
            raise ValueError(f"d_state={self.d_state} is odd; states are conjugate pairs")
        for name in self.inits:
            if self.rank < MEASURES.get(name, 1):
                raise ValueError(f"init={name!r} needs rank={MEASURES[name]}, got {self.rank}")
        return self


def _expect_inits(config: StateSpaceConfig, known: tuple[str, ...]) -> None:
    for name in config.inits:
        if name not in known:
            raise ValueError(f"init={config.init!r}: no system {name!r}; there are: {', '.join(known)}")


def capabilities_of(config: StateSpaceConfig) -> Capabilities:
    """A causal one decodes from its state; the other looks both ways. The matrix is the same for every input."""
    rank: Structure = Semiseparable(config.d_state)
    backends = [BackendSpec("fft"), BackendSpec("chunked"), BackendSpec("reference")]
    if isinstance(config, S4Config):
        fits = (1 + config.rank) * (config.kernels + config.rank) <= MOST_SUMS
    else:
        fits = config.pairs <= MOST_MODES
    if fits:
        dtypes = ("float32", "bfloat16", "float16")
        backends.insert(0, BackendSpec("triton", devices=("cuda",), dtypes=dtypes, needs=("triton",)))
    return Capabilities(
        causal=config.causal,
        bidirectional=not config.causal,
        stateful=config.causal,
        varlen=True,
        padding_mask=True,
        max_length=config.max_length is not None,
        matrix_form=True,
        data_dependent=False,
        structures=(Toeplitz(), rank),
        backends=tuple(backends),
    )

"""What the layers of `s4` and `s4d` share: parameters of time steps and systems, skip, activation, output map."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.ops.long_convolution import long_convolution

from sequence_mixer import Cost, MatrixForm, SequenceMixer
from sequence_mixer.shapes import accumulation_dtype
from zoo_s4.config import StateSpaceConfig, capabilities_of
from zoo_s4.parameters import initial_dt, positive, shared

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "none": lambda y: y,
}
PER_SYSTEM = ("inv_dt", "A_real", "A_imag", "B", "P")  # parameters with a slower rate and no weight decay


class StateSpaceLayer(SequenceMixer):
    """y = output(activation(K * x + D x)), [B,T,D] -> [B,T,D]: one kernel K and skip for each channel and readout.

    Parameters: D [channels,D]; inv_dt [D,1] or [D,N/2], time steps before `dt_transform`; A_real, A_imag [S,N/2], -A
    before their transforms; C [channels (twice if not causal),D,N/2,2]; output_linear.weight [2D or D, channels D],
    columns readout by readout. Numbers that follow from them are computed in float64.
    """

    config: StateSpaceConfig
    A_real: Tensor
    A_imag: Tensor

    def __init__(self, config: StateSpaceConfig) -> None:
        super().__init__(config, capabilities_of(config))
        self.D = nn.Parameter(torch.randn(config.channels, config.d_model))
        self.inv_dt = nn.Parameter(initial_dt(config))
        if config.output != "none":
            width = config.d_model * (2 if config.output == "glu" else 1)
            self.output_linear = nn.Linear(config.channels * config.d_model, width, bias=config.bias)

    @abstractmethod
    def kernel(self, length: int) -> Tensor:
        """Taps of every kernel, float64 [kernels,D,length]; those that look ahead are the second half."""

    def matrix_form(self, x: Tensor) -> MatrixForm:
        """M_ij = K_{i-j} + D d_ij (+ K'_{j-i-1} for j > i if not causal), one matrix per readout and channel."""
        self._check_call(x, None, None)
        config, tokens = self.config, x.shape[1]
        taps = self.kernel(tokens).to(accumulation_dtype(x.dtype)).unflatten(0, (-1, config.channels))
        behind = taps[0].flatten(0, 1)  # [H,T] with H = channels D
        ahead = None if config.causal else taps[1].flatten(0, 1)
        skip = self.D.to(taps.dtype).flatten()
        step = torch.arange(tokens, device=x.device)
        distance = step.unsqueeze(1) - step

        def build(heads: slice) -> Tensor:
            lower = torch.where(distance >= 0, behind[heads][:, distance.clamp(min=0)], 0.0)
            matrix = lower + torch.diag_embed(skip[heads].unsqueeze(1).expand(-1, tokens))
            if ahead is not None:
                upper = ahead[heads][:, (-distance - 1).clamp(min=0)]
                matrix = matrix + torch.where(distance < 0, upper, 0.0)
            return matrix.unsqueeze(0).expand(x.shape[0], -1, -1, -1)

        values = self._repeated(x).unsqueeze(3)
        return MatrixForm(build, values.shape[2], values, lambda mixed: self._finish(mixed.flatten(2).to(x.dtype)))

    def parameter_groups(self) -> Mapping[str, dict[str, float]]:
        """Time steps, A, B and P: `ssm_lr_scale` of the learning rate and no decay, as the reference trains them."""
        own = dict(self.named_parameters())
        slow = {"weight_decay": 0.0, "lr_scale": self.config.ssm_lr_scale}
        return {name: dict(slow) for name in PER_SYSTEM if name in own}

    def _mix(
        self, x: Tensor, state: Any, cu_seqlens: Tensor | None, padding_mask: Tensor | None, donate: bool
    ) -> tuple[Tensor, Any]:
        """As everywhere, but without a past, zeros around a sequence change nothing in it, and rows may stay rows:
        packed into one they would ask for a kernel as long as the whole batch."""
        if padding_mask is None or state is not None:
            return super()._mix(x, state, cu_seqlens, padding_mask, donate)
        real = padding_mask.unsqueeze(-1)
        y, _ = self.mix(torch.where(real, x, 0.0), None, cu_seqlens=None, padding_mask=None, donate=donate)
        return torch.where(real, y, 0.0), None

    def _systems(self) -> tuple[Tensor, Tensor]:
        """Time steps [D,1] or [D,N/2], float64, and the diagonal of A for every channel, complex128 [D,N/2]."""
        config = self.config
        dt = positive(self.inv_dt, config.dt_transform)
        real = positive(self.A_real, config.real_transform)
        imag = positive(self.A_imag, config.imag_transform) if hasattr(self, "A_imag") else torch.zeros_like(real)
        return dt, shared(torch.complex(-real, -imag), config.d_model, 0)

    def _repeated(self, x: Tensor) -> Tensor:
        """x [B,T,D] once for each readout, [B,T,channels D]."""
        return x if self.config.channels == 1 else x.repeat(1, 1, self.config.channels)

    def _convolve(self, x: Tensor, cu_seqlens: Tensor | None, backend: str) -> Tensor:
        """Convolution with the kernels plus the skip, [B,T,channels D]. backend: of `long_convolution`."""
        config = self.config
        kernel = self.kernel(longest_sequence(x, cu_seqlens)).to(accumulation_dtype(x.dtype))
        taps = kernel.unflatten(0, (-1, config.channels)).flatten(1, 2)
        return long_convolution(
            self._repeated(x),
            taps[0],
            D=self.D.flatten(),
            reverse_kernel=None if config.causal else taps[1],
            reverse_lag=1,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )

    def _finish(self, y: Tensor) -> Tensor:
        """Activation and output map of y [B,T,channels D]."""
        y = ACTIVATIONS[self.config.activation](y)
        if self.config.output == "none":
            autocast = torch.is_autocast_enabled(y.device.type)
            return y.to(torch.get_autocast_dtype(y.device.type)) if autocast else y
        y = self.output_linear(y)
        return F.glu(y, -1) if self.config.output == "glu" else y

    def _cost(self, batch_size: int, length: int, dtype: torch.dtype, mixing: int, state: int) -> Cost:
        """mixing: FLOPs of the scan or of the kernels. state: elements of one sequence's state."""
        config, tokens = self.config, batch_size * length
        parameters = sum(parameter.numel() for parameter in self.parameters())
        width = {"glu": 2, "linear": 1, "none": 0}[config.output] * config.d_model
        return Cost(
            flops=2 * tokens * config.channels * config.d_model * width + mixing,
            bytes=dtype.itemsize * (parameters + 2 * tokens * config.d_model),
            parameters=parameters,
            state_elements=batch_size * state if config.causal else 0,
        )


def longest_sequence(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Tokens of the longest sequence of x [B,T,D]; T where lengths cannot be read (compiled, or in a CUDA graph)."""
    if cu_seqlens is None or torch.compiler.is_compiling():
        return x.shape[1]
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return x.shape[1]
    return int(cu_seqlens.diff().max())


def complex_normal(*shape: int) -> Tensor:
    """Complex normal numbers of variance 1 as pairs [...,2]."""
    return torch.randn(*shape, 2) * math.sqrt(0.5)

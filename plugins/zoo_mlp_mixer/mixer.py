"""The token-mixing half of an MLP-Mixer block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.ops.alignment import RealFirst
from zoo.ops.token_mlp import flops as token_mlp_flops
from zoo.ops.token_mlp import token_mlp

from sequence_mixer import Capabilities, Cost, MatrixForm, SequenceMixer
from zoo_mlp_mixer.config import MlpMixerConfig
from zoo_mlp_mixer.secant import secant_slope

TRUNCATED_STD = 0.8796256610342398  # standard deviation of a standard normal cut off at -2 and 2


class TokenMlp(nn.Module):
    """Weights of the two layers: fc1 Linear(max_length, Ds), fc2 Linear(Ds, max_length)."""

    def __init__(self, tokens: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(tokens, hidden, bias=bias), nn.Linear(hidden, tokens, bias=bias)
        for layer in (self.fc1, self.fc2):
            std = layer.in_features**-0.5 / TRUNCATED_STD
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if bias:
                nn.init.zeros_(layer.bias)


class MlpMixer(SequenceMixer):
    """y = W_2 gelu(W_1 n(x) + b_1) + b_2 (+ x under `residual`) on x [T,D]; n is norm1 under `pre_norm`, else nothing.

    mlp_tokens: fc1 Linear(max_length, Ds), fc2 Linear(Ds, max_length); T tokens use T columns of W_1 and T rows of W_2.
    """

    config: MlpMixerConfig
    pads_natively = True

    def __init__(self, config: MlpMixerConfig, capabilities: Capabilities) -> None:
        super().__init__(config, capabilities)
        self.norm1 = nn.LayerNorm(config.d_model, eps=config.norm_eps) if config.pre_norm else None
        self.mlp_tokens = TokenMlp(config.max_length, config.hidden, config.bias)

    def mix(
        self, x: Tensor, state: None, *, cu_seqlens: Tensor | None, padding_mask: Tensor | None, donate: bool
    ) -> tuple[Tensor, None]:
        if padding_mask is not None:
            x = torch.where(padding_mask.unsqueeze(-1), x, 0)
        values = self._values(x)
        aligned = None if padding_mask is None else RealFirst(padding_mask)
        if aligned is not None:
            values = aligned.turn(values)
        first, second = self.mlp_tokens.fc1, self.mlp_tokens.fc2
        y = token_mlp(
            values,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            activation=self.config.activation,
            causal=self.config.causal,
            backend=self.backend,
        )
        if aligned is not None:
            y = aligned.turn_back(y)
        return self._finish(y, x), None

    def matrix_form(self, x: Tensor) -> MatrixForm:
        """M^c = W_2 diag(s^c) W_1 for channel c, s the slope of the GELU's secant from b_1 to b_1 + W_1 x_c.

        M x_c = y_c - y(0), exactly: all that depends on the input is in M, and `finish` adds y(0), that of an input of
        zeros.
        """
        self._check_call(x, None, None)
        values, tokens = self._values(x), x.shape[1]
        w1, b1, w2, b2 = self._weights(tokens, values.dtype)
        approximate = "tanh" if self.config.activation == "gelu_tanh" else "none"
        slope = secant_slope(torch.einsum("et,btd->bed", w1, values), b1[:, None], approximate)
        at_zero = w2 @ F.gelu(b1, approximate=approximate) + b2  # [T]
        wide = slope.dtype

        def build(channels: slice) -> Tensor:
            scaled = torch.einsum("te,bec->bcte", w2.to(wide), slope[:, :, channels])
            return scaled @ w1.to(wide)

        def finish(mixed: Tensor) -> Tensor:
            return self._finish((mixed.squeeze(-1) + at_zero[:, None]).to(values.dtype), x)

        return MatrixForm(build, self.config.d_model, values[..., None], finish)

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        """FLOPs 4 B T Ds D; T in place of Ds if causal, whole squares counted."""
        config = self.config
        parameters = 2 * config.max_length * config.hidden + 2 * config.d_model * config.pre_norm
        parameters += (config.max_length + config.hidden) * config.bias
        units = length if config.causal else config.hidden
        return Cost(
            flops=token_mlp_flops(batch_size, length, config.d_model, units),
            bytes=(parameters + 2 * batch_size * length * config.d_model) * dtype.itemsize,
            parameters=parameters,
            state_elements=0,
        )

    def _values(self, x: Tensor) -> Tensor:
        """What the MLP mixes, [B,T,D]: x or norm1(x), in the autocast dtype inside autocast."""
        values = x if self.norm1 is None else self.norm1(x)
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            return values.to(torch.get_autocast_dtype(kind))
        return values.to(x.dtype)

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        """y [B,T,D] with the input added under `residual`, in the dtype of y."""
        return (x + y).to(y.dtype) if self.config.residual else y

    def _weights(self, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_1 [E,T], b_1 [E], W_2 [T,E] and b_2 [T] of `tokens` tokens, triangles and zeros filled in."""
        first, second = self.mlp_tokens.fc1, self.mlp_tokens.fc2
        units = tokens if self.config.causal else self.config.hidden
        w1, w2 = first.weight[:units, :tokens].to(dtype), second.weight[:tokens, :units].to(dtype)
        if self.config.causal:
            w1, w2 = w1.tril(), w2.tril()
        if not self.config.bias:
            return w1, w1.new_zeros(units), w2, w2.new_zeros(tokens)
        return w1, first.bias[:units].to(dtype), w2, second.bias[:tokens].to(dtype)

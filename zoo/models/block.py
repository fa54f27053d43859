"""A residual block around any mixer: x + mixer(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sequence_mixer.mixer import SequenceMixer


class GatedMlp(nn.Module):
    """out(SiLU(gate(x)) * value(x)), [..., D] -> [..., D]. Source: Shazeer 2020 (SwiGLU)."""

    def __init__(self, d_model: int, width: int) -> None:
        """width: hidden channels E, >= 1."""
        super().__init__()
        self.gate_value = nn.Linear(d_model, 2 * width, bias=False)
        self.out = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D]. Returns [..., D]."""
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        out: Tensor = self.out(F.silu(gate) * value)
        return out


class Block(nn.Module):
    """Pre-norm residual block; dropout lives here, because mixers hold none.

    mixer: any mixer of width D. mlp_width: hidden width of the MLP, 0 for none.
    """

    def __init__(self, mixer: SequenceMixer, *, mlp_width: int, norm_eps: float, dropout: float) -> None:
        super().__init__()
        d_model = mixer.config.d_model
        self.mixer_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(d_model, eps=norm_eps) if mlp_width else None
        self.mlp = GatedMlp(d_model, mlp_width) if mlp_width else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """x: [B,T,D]; cu_seqlens [S+1], padding_mask [B,T] go to the mixer. Returns [B,T,D]."""
        mixed = self.mixer(self.mixer_norm(x), cu_seqlens=cu_seqlens, padding_mask=padding_mask)
        return self._after_mixer(x, mixed)

    def extend(
        self,
        x: Tensor,
        state: Any,
        *,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        donate: bool = False,
    ) -> tuple[Tensor, Any]:
        """The next tokens x [B,T,D] after `state`. Returns [B,T,D] and the new state of the mixer."""
        mixed, after = self.mixer.extend(
            self.mixer_norm(x), state, cu_seqlens=cu_seqlens, padding_mask=padding_mask, donate=donate
        )
        return self._after_mixer(x, mixed), after

    def _after_mixer(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(mixed)
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x

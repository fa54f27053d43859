"""The arguments of one long convolution, and what every plain path does with the gates and the skip."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


@dataclass(frozen=True)
class Convolution:
    """Arguments of `long_convolution` beside x: kernel [D,K], D [D], reverse_kernel [D,R], gates [B,T,D], int [S+1]."""

    kernel: Tensor
    D: Tensor | None
    reverse_kernel: Tensor | None
    reverse_lag: int
    pre_gate: Tensor | None
    post_gate: Tensor | None
    cu_seqlens: Tensor | None

    def taps(self, tokens: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kernel and reverse kernel in the dtype of `like`, without the taps that no token of `tokens` can reach."""
        kernel = self.kernel[:, :tokens].to(like.dtype)
        if self.reverse_kernel is None or tokens <= self.reverse_lag:
            return kernel, None
        return kernel, self.reverse_kernel[:, : tokens - self.reverse_lag].to(like.dtype)

    def gate_in(self, x: Tensor) -> Tensor:
        """u = pre_gate x in the accumulation dtype."""
        inner = accumulation_dtype(x.dtype)
        return x.to(inner) if self.pre_gate is None else x.to(inner) * self.pre_gate.to(inner)

    def gate_out(self, convolved: Tensor, u: Tensor, x: Tensor) -> Tensor:
        """y = post_gate (convolved + D u), rounded once to the dtype of x."""
        if self.D is not None:
            convolved = convolved + self.D.to(u.dtype) * u
        if self.post_gate is not None:
            convolved = convolved * self.post_gate.to(u.dtype)
        return convolved.to(x.dtype)

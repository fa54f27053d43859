"""The arguments of one diagonal scan."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


@dataclass(frozen=True)
class Scan:
    """Arguments of `lti_scan` beside x: log_a, c, c_reverse [D,M,2], D [D], initial_state [S,D,M,2], int [S+1]."""

    log_a: Tensor
    c: Tensor
    D: Tensor | None
    c_reverse: Tensor | None
    reverse_lag: int
    initial_state: Tensor | None
    cu_seqlens: Tensor | None

    def sequences(self, x: Tensor) -> int:
        """S, packed sequences, or rows of the batch."""
        return x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def untouched(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and the final state where x [B,T,D] has no element."""
        if self.initial_state is not None:
            return x.clone(), self.initial_state.clone()
        shape = (self.sequences(x), *self.log_a.shape)
        return x.clone(), x.new_zeros(shape, dtype=accumulation_dtype(x.dtype))

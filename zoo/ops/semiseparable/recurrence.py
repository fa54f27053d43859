"""One token of the semiseparable scan: what decoding calls."""

from __future__ import annotations

from torch import Tensor

from sequence_mixer.shapes import accumulation_dtype


def one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`semiseparable` for T = 1: no chunk, no padding; y [B,1,H,P] and state [B,H,P,N] in the accumulation dtype."""
    inner = accumulation_dtype(v.dtype)
    batch, _, heads, channels = v.shape
    groups, width = q.shape[2:]
    by_group = (batch, groups, heads // groups, channels)
    values = v.to(inner) if scale is None else v.to(inner) * scale.unsqueeze(-1)
    state = values.reshape(*by_group, 1) * k.to(inner).reshape(batch, groups, 1, 1, width)
    if initial_state is not None:
        kept = initial_state.reshape(*by_group, width)
        if log_decay is not None:
            kept = kept * log_decay.exp().reshape(*by_group[:3], 1, 1)
        state = state + kept
    y = state @ q.to(inner).reshape(batch, groups, 1, width, 1)
    return y.reshape(batch, 1, heads, channels), state.reshape(batch, heads, channels, width)

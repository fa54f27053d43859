"""Linear attention in plain PyTorch: which of its three forms serves a call, and what they have in common."""

from __future__ import annotations

from torch import Tensor

from zoo.ops.linear_attention.bidirectional import sum_over_all
from zoo.ops.linear_attention.channel_decay import scan_channels
from zoo.ops.linear_attention.feature_map import features, for_every_head, key_features
from zoo.ops.linear_attention.normaliser import finish, with_ones
from zoo.ops.semiseparable.chunked import scan


def linear_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    feature_map: str,
    causal: bool,
    normalize: bool,
    eps: float,
    scale: float,
    padding_mask: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `linear_attention`. Everything is summed in the accumulation dtype; y is rounded once."""
    heads = q.shape[2]
    phi_q = features(q, feature_map)
    phi_k = key_features(k, feature_map, heads, padding_mask)
    values = with_ones(for_every_head(v.to(phi_q.dtype), heads), normalize)
    if not causal:
        sums, final_state = sum_over_all(phi_q, phi_k, values, cu_seqlens)
    elif log_decay is not None and log_decay.dim() == 4:
        sums, final_state = scan_channels(phi_q, phi_k, values, log_decay, initial_state, cu_seqlens)
    else:
        initial = None if initial_state is None else initial_state.mT
        sums, final = scan(phi_q, phi_k, values, log_decay, None, initial, cu_seqlens)
        final_state = final.mT
    return finish(sums, normalize, eps, scale).to(v.dtype), final_state

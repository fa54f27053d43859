"""Linear attention without order: one sum over all tokens, read by every query."""

from __future__ import annotations

from torch import Tensor

from zoo.ops.semiseparable.chunked import packed_in_chunks


def sum_over_all(phi_q: Tensor, phi_k: Tensor, values: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """phi_q [B,T,H,N], phi_k [B,K,H,N], values [B,K,H,P], one dtype; K = T if packed.

    Returns what the queries read, [B,T,H,P], and the sums of phi(k) v^T, [B,H,N,P] or [S,H,N,P].
    """
    if cu_seqlens is None:
        total = phi_k.movedim(1, 3) @ values.movedim(1, 2)  # [B,H,N,P]
        return (phi_q.movedim(1, 2) @ total).movedim(2, 1), total
    sequences = cu_seqlens.numel() - 1
    empty = values.new_zeros(sequences, phi_k.shape[2], phi_k.shape[3], values.shape[3])
    if values.shape[1] == 0:
        return values, empty
    layout = packed_in_chunks(values, cu_seqlens)
    assert layout.sequence is not None
    q_CHKN, k_CHKN, v_CHKP = (layout.split(part)[0].movedim(1, 2) for part in (phi_q, phi_k, values))
    total = empty.index_add(0, layout.sequence, k_CHKN.mT @ v_CHKP)  # [S,H,N,P]
    read = q_CHKN @ total.index_select(0, layout.sequence)
    return layout.join(read.movedim(2, 1).unsqueeze(0)), total

"""The mixing matrix of a Linformer layer: attention weights over the projected keys, times the values' projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sequence_mixer import MatrixForm
from sequence_mixer.shapes import accumulation_dtype


def mixing_matrix(
    q: Tensor, keys: Tensor, v: Tensor, F: Tensor | None, window: int | None, finish: Callable[[Tensor], Tensor]
) -> MatrixForm:
    """q [B,T,H,P], keys [B,R,G,P], v [B,T,G,P].

    F: the values' projection [G,R,T], for one matrix per head. None: the maximum over windows of `window` tokens, for
    one matrix per channel, whose row r has its 1 at the largest value of window r; values are then [B,T,H P,1].
    """
    heads, width = q.shape[2:]
    each, wide = heads // v.shape[2], accumulation_dtype(q.dtype)
    keys, v = keys.repeat_interleave(each, 2), v.repeat_interleave(each, 2)
    logits = torch.einsum("bthp,brhp->bhtr", q.to(wide), keys.to(wide)) * width**-0.5
    weights = logits.softmax(-1)  # [B,H,T,R]
    if F is not None:
        matrices = F.to(wide).repeat_interleave(each, 0)  # [H,R,T]
        return MatrixForm(lambda which: weights[:, which] @ matrices[which], heads, v, finish)
    assert window is not None
    values = v.flatten(2)  # [B,T,H P]
    largest = places_of_maxima(values, window)

    def build(which: slice) -> Tensor:
        channels = torch.arange(values.shape[2], device=v.device)[which]
        picked = torch.nn.functional.one_hot(largest[:, :, which], v.shape[1])  # [B,R,c,T]
        return torch.einsum("bctr,brcs->bcts", weights[:, channels // width], picked.to(wide))

    return MatrixForm(build, values.shape[2], values[..., None], lambda mixed: finish(mixed.squeeze(-1)))


def places_of_maxima(values: Tensor, window: int) -> Tensor:
    """Token that is the largest of each window, channel by channel: values [B,T,C] -> int64 [B,R,C]."""
    starts = range(0, values.shape[1], window)
    return torch.stack([values[:, start : start + window].argmax(1) + start for start in starts], 1)

"""Linformer attention: keys and values are projected along the length to R rows, and queries attend to those.

y = softmax(q (E k)^T P^-1/2) (F v). Source: Wang et al. 2020 (arXiv 2006.04768).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sequence_mixer.errors import DtypeError, ShapeError
from sequence_mixer.shapes import expect_floating, expect_padding_mask, expect_same_device, expect_shape
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select, without_autocast
from zoo.ops.linformer_attention import chunked, reference
from zoo.ops.linformer_attention.triton_path import linformer_attention_triton

__all__ = ["fits_on_chip", "flops", "linformer_attention"]

MAX_TILE_BYTES = 64 * 1024  # projected keys of one head; the values take as much again
WIDEST, MOST_ROWS = 256, 1024  # channels of a head and projected keys, for the Triton kernels


def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    E: Tensor,
    F: Tensor,
    *,
    padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from T queries to R projected keys and values; logits are scaled by P^-1/2. Every token sees every other.

    q: [B,T,H,P]. k, v: [B,T,G,P]. H is a multiple of G; query head h reads key head h // (H/G).
    E, F: [R,K] for all heads, or [G,R,K], one matrix per key head; K >= T. Column t meets the t-th real token, columns
        beyond the last are not used. They may have another floating dtype than q, and are rounded to that of q.
    padding_mask: bool [B,T], True = real, one run per row. Padded keys and values count as 0 before the projection,
        so that a padded row equals the row without padding; padded rows of the result are 0. What stands in padded
        slots (NaN too) does not matter.
    backend: "auto", "triton" (projected keys of a head within 64 KiB, 1024 at most), "chunked" or "reference".
    Returns y [B,T,H,P] in the dtype of q.
    Raises ShapeError, DtypeError, DeviceError, PackingError, BackendError.
    """
    sizes = expect_shape("q", q, "B T H P")
    sizes = expect_shape("k", k, "B T G P", sizes)
    sizes = expect_shape("v", v, "B T G P", sizes)
    heads, groups, tokens = sizes["H"], sizes["G"], sizes["T"]
    if groups == 0 or heads % groups:
        raise ShapeError(f"q has H={heads} heads, k has G={groups}; H must be a multiple of G")
    expect_floating("q", q)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise DtypeError(f"{name} is {tensor.dtype}, q is {q.dtype}; cast one, they must agree")
    rank = _expect_projections(E, F, groups, tokens)
    expect_same_device(q, k=k, v=v, E=E, F=F, padding_mask=padding_mask)
    if padding_mask is not None:
        expect_padding_mask(padding_mask, sizes["B"], tokens)
    facts = {
        "rank": rank,
        "width": sizes["P"],
        "element_size": q.element_size(),
        "empty": q.numel() == 0,
    }
    attend = select("linformer_attention", backend, (q, k, v, E, F), facts)
    E, F = E[..., :tokens].to(q.dtype), F[..., :tokens].to(q.dtype)
    with without_autocast(q):
        y: Tensor = attend(q, k, v, E, F, padding_mask=padding_mask)
    return y


def flops(batch: int, tokens: int, heads: int, groups: int, head_dim: int, rank: int) -> int:
    """Matrix-product FLOPs of the forward, 2 per multiply-add: 4 B T R P (G + H), projections and attention."""
    return 4 * batch * tokens * rank * head_dim * (groups + heads)


def fits_on_chip(rank: int, head_dim: int, element_size: int) -> bool:
    """True if the Triton kernels can hold the projected keys of a head, [R,P], in one tile; element_size in bytes."""
    tile = max(16, 1 << max(rank - 1, 0).bit_length()) * max(16, 1 << (head_dim - 1).bit_length())
    return head_dim <= WIDEST and rank <= MOST_ROWS and tile * element_size <= MAX_TILE_BYTES


def _expect_projections(E: Tensor, F: Tensor, groups: int, tokens: int) -> int:
    """Check E and F against G and T, and return R."""
    for name, matrix in (("E", E), ("F", F)):
        expect_floating(name, matrix)
        layout = "R K" if matrix.dim() == 2 else "G R K"
        sizes = expect_shape(name, matrix, layout, {"G": groups})
        if sizes["K"] < tokens:
            wanted = f"[{', '.join(layout.split())}] with K >= T={tokens}"
            hint = "; it looks transposed, pass .mT" if sizes["R"] >= tokens else ""
            raise ShapeError(f"{name} has shape {list(matrix.shape)}, wanted {wanted}{hint}")
        if sizes["R"] == 0:
            raise ShapeError(f"{name} has shape {list(matrix.shape)}, wanted at least one row")
    if E.shape[:-1] != F.shape[:-1]:
        raise ShapeError(f"E has shape {list(E.shape)}, F {list(F.shape)}; they need the same heads and the same rank")
    return E.shape[-2]


def _plain_refuses(empty: bool, **_: Any) -> str | None:
    return "an input is empty" if empty else None


def _triton_refuses(rank: int, width: int, element_size: int, empty: bool) -> str | None:
    if width > WIDEST:
        return f"takes heads of up to {WIDEST} channels, these have {width}"
    if not fits_on_chip(rank, width, element_size):
        return (
            f"holds the projected keys of a head on chip, up to {MOST_ROWS} and up to {MAX_TILE_BYTES // 1024} KiB in "
            f"powers of two; these are R={rank} keys of P={width} channels of {element_size} bytes"
        )
    return _plain_refuses(empty)


register_backend(
    "linformer_attention", Serves("reference"), reference.linformer_attention_reference, priority=REFERENCE
)
register_backend(
    "linformer_attention",
    Serves("chunked"),
    chunked.linformer_attention_chunked,
    refuses=_plain_refuses,
    priority=PLAIN,
)
register_backend(
    "linformer_attention",
    Serves("triton", devices=("cuda",), dtypes=("float32", "bfloat16", "float16"), needs=("triton",)),
    linformer_attention_triton,
    refuses=_triton_refuses,
    priority=KERNEL,
)

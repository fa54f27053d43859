"""Synthetic attention: softmax attention whose logits are a sum of parts that need no key of the input.

With p_i the position of query i in its sequence and key j at position j of it,

    R_ij = <q_i, k_j> + table[p_i, j] + left_i[j // b] right_i[j % b]      y_i = sum_j softmax_j(R_ij) v_j

Every part is optional. Source: Tay et al. 2021 (Synthesizer), sections 3.2 to 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.errors import DtypeError, PackingError, ShapeError
from sequence_mixer.shapes import expect_cu_seqlens, expect_floating, expect_same_device, expect_shape
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select
from zoo.ops.synthetic_attention import chunked, reference
from zoo.ops.synthetic_attention.parts import Parts
from zoo.ops.synthetic_attention.triton_path import synthetic_attention_triton

__all__ = ["flops", "synthetic_attention"]

MAX_WIDTH = 256  # channels of q, v, left and right that the Triton kernels hold


def synthetic_attention(
    v: Tensor,
    *,
    q: Tensor | None = None,
    k: Tensor | None = None,
    table: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    queries: int | None = None,
    past: Tensor | None = None,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend with logits that are the sum of the parts given, at least one of them.

    v: [B,Tk,H,P]. q: [B,Tq,H,N] and k: [B,Tk,H,N], not scaled. left: [B,Tq,H,a] and right: [B,Tq,H,b], a b at least
        the longest sequence of keys. These have one dtype; any of them may be expanded along the batch.
    table: [H,Lq,Lk], logits by position, any floating dtype; Lq and Lk at least the positions that occur.
    queries: Tq, if neither q nor left says it; Tk by default.
    past: int [B], tokens before the first query of each row: query i stands at position past + i. By default queries
        are the last Tq of Tk tokens (of each sequence, when packed).
    causal: a query sees keys up to its own position.
    cu_seqlens: int [S+1], boundaries of S sequences of queries packed into one row (B = 1), without `past`;
        cu_seqlens_k those of the keys (cu_seqlens by default). Empty sequences are served.
    backend: "auto", "triton", "chunked" or "reference".
    Returns y [B,Tq,H,P] in the dtype of v; a query that sees no key gives 0, with zero gradients.
    Raises ShapeError, DtypeError, DeviceError, PackingError, BackendError.
    """
    sizes = _expect_parts(v, q, k, table, left, right, queries)
    if past is not None:
        if cu_seqlens is not None:
            raise PackingError("cu_seqlens and past came together; packed queries are the last of their sequence")
        expect_shape("past", past, "B", sizes)
    cu_seqlens_k = _expect_packing(cu_seqlens, cu_seqlens_k, sizes)
    _expect_all_positions(sizes, cu_seqlens is not None, past is None)
    expect_same_device(
        v, q=q, k=k, table=table, left=left, right=right, past=past, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k
    )
    facts = {
        "empty": v.numel() == 0 or sizes["Tq"] == 0,
        "widest": max(sizes["P"], sizes.get("N", 1), sizes.get("a", 1), sizes.get("b", 1)),
        "table_dtype": None if table is None else table.dtype,
    }
    attend = select("synthetic_attention", backend, (v, q, k, table, left, right), facts)
    parts = Parts(q=q, k=k, table=table, left=left, right=right)
    y: Tensor = attend(
        parts,
        v,
        queries=sizes["Tq"],
        past=past,
        causal=causal,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
    )
    return y


def flops(batch: int, queries: int, keys: int, heads: int, width: int, value_dim: int) -> int:
    """Matrix-product FLOPs of the forward, 2 per multiply-add: 2 B H Tq Tk (N + P), N = `width`, 0 without q and k."""
    return 2 * batch * heads * queries * keys * (width + value_dim)


def _expect_parts(
    v: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    table: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    queries: int | None,
) -> dict[str, int]:
    sizes = expect_shape("v", v, "B Tk H P")
    expect_floating("v", v)
    for one, other, names in ((q, k, "q and k"), (left, right, "left and right")):
        if (one is None) != (other is None):
            raise ShapeError(f"{names} go together: one of them is missing")
    if q is None and table is None and left is None:
        raise ShapeError("there are no logits: pass q and k, a table, or left and right")
    if queries is not None:
        sizes["Tq"] = queries
    elif q is None and left is None:
        sizes["Tq"] = sizes["Tk"]
    for name, tensor, layout in (
        ("q", q, "B Tq H N"), ("k", k, "B Tk H N"), ("left", left, "B Tq H a"), ("right", right, "B Tq H b"),
    ):  # fmt: skip
        if tensor is not None:
            sizes = expect_shape(name, tensor, layout, sizes)
            if tensor.dtype != v.dtype:
                raise DtypeError(f"{name} is {tensor.dtype}, v is {v.dtype}; cast one, they must agree")
    if table is not None:
        sizes = expect_shape("table", table, "H Lq Lk", sizes)
        expect_floating("table", table)
    return sizes


def _expect_all_positions(sizes: dict[str, int], packed: bool, counted: bool) -> None:
    """Raise ShapeError if a part has no logits for a key or a query that is there, as far as sizes tell.

    counted: queries are the last of the keys, so that no position lies behind the last key.
    """
    keys = sizes["Tk"]
    if packed:
        return
    if sizes.get("Lk", keys) < keys or (counted and sizes.get("Lq", keys) < keys):
        raise ShapeError(f"table is [H, Lq={sizes['Lq']}, Lk={sizes['Lk']}], wanted at least Tk={keys} of each")
    if "a" in sizes and sizes["a"] * sizes["b"] < keys:
        raise ShapeError(f"left and right have a={sizes['a']} and b={sizes['b']}, wanted a b of at least Tk={keys}")


def _expect_packing(cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, sizes: dict[str, int]) -> Tensor | None:
    """Check the boundaries and return those of the keys."""
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise PackingError("cu_seqlens_k came without cu_seqlens; pass the boundaries of the queries too")
        return None
    expect_cu_seqlens(cu_seqlens, sizes["Tq"], sizes["B"])
    if cu_seqlens_k is None:
        if sizes["Tq"] != sizes["Tk"]:
            raise PackingError(
                f"there are Tq={sizes['Tq']} packed queries and Tk={sizes['Tk']} keys; pass cu_seqlens_k, [S+1]"
            )
        return cu_seqlens
    expect_cu_seqlens(cu_seqlens_k, sizes["Tk"], sizes["B"])
    if cu_seqlens_k.shape != cu_seqlens.shape:
        raise PackingError(
            f"cu_seqlens has {cu_seqlens.numel() - 1} sequences, cu_seqlens_k {cu_seqlens_k.numel() - 1}; "
            "queries and keys must have the same number"
        )
    return cu_seqlens_k


def _triton_refuses(empty: bool, widest: int, table_dtype: torch.dtype | None) -> str | None:
    if widest > MAX_WIDTH:
        return f"holds rows of up to {MAX_WIDTH} channels, the widest part here has {widest}"
    if table_dtype == torch.float64:
        return "takes a table of at most float32, this is float64"
    return "an input is empty" if empty else None


register_backend(
    "synthetic_attention", Serves("reference"), reference.synthetic_attention_reference, priority=REFERENCE
)
register_backend("synthetic_attention", Serves("chunked"), chunked.synthetic_attention_chunked, priority=PLAIN)
register_backend(
    "synthetic_attention",
    Serves("triton", devices=("cuda",), dtypes=("float32", "bfloat16", "float16"), needs=("triton",)),
    synthetic_attention_triton,
    refuses=_triton_refuses,
    priority=KERNEL,
)

"""Softmax attention: y_i = sum_j softmax_j(scale <q_i, k_j> + bias_ij) v_j over the keys that query i sees.

Source: Vaswani et al. 2017; the tiled form is Dao et al. 2022 and Dao 2023. Grouped heads: Ainslie et al. 2023.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sequence_mixer.errors import DtypeError, PackingError, ShapeError
from sequence_mixer.shapes import (
    expect_cu_seqlens,
    expect_floating,
    expect_padding_mask,
    expect_same_device,
    expect_shape,
)
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select
from zoo.ops.softmax_attention import chunked, reference, sdpa
from zoo.ops.softmax_attention.triton_path import softmax_attention_triton

__all__ = ["flops", "softmax_attention"]

MAX_HEAD_WIDTH = 256


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    bias: Tensor | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from queries to keys and values.

    q: [B,Tq,H,P]. k: [B,Tk,G,P]. v: [B,Tk,G,Pv]. H is a multiple of G; query head h reads key head h // (H/G).
    causal: query i sees key j if j <= i + Tk - Tq (aligned at the end, so that one query sees every key).
    scale: factor of the dot products, P^-1/2 by default.
    bias: added to the scaled logits, floating, broadcastable to [B,H,Tq,Tk], differentiable; -inf hides a key. A
        bool tensor selects instead: False hides a key.
    padding_mask: bool [B,Tk], True = real key, one run per row. With Tq == Tk it also says which queries are real:
        padded rows of the result are 0. What stands in padded slots (NaN too) does not matter.
    cu_seqlens: int [S+1], boundaries of S sequences packed into q [1,Tq,H,P]; cu_seqlens_k those of k and v
        (cu_seqlens by default). `causal` is aligned at the end of each sequence. Empty sequences are served.
    backend: "auto", "sdpa" (torch's own kernels), "triton", "chunked" or "reference".
    Returns y [B,Tq,H,Pv] in the dtype of q; a query that sees no key gives 0, with zero gradients.
    Raises ShapeError, DtypeError, DeviceError, PackingError, BackendError.
    """
    sizes = expect_shape("q", q, "B Tq H P")
    sizes = expect_shape("k", k, "B Tk G P", sizes)
    sizes = expect_shape("v", v, "B Tk G Pv", sizes)
    heads, groups = sizes["H"], sizes["G"]
    if groups == 0 or heads % groups:
        raise ShapeError(f"q has H={heads} heads, k has G={groups}; H must be a multiple of G")
    expect_floating("q", q)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise DtypeError(f"{name} is {tensor.dtype}, q is {q.dtype}; cast one, they must agree")
    expect_same_device(
        q, k=k, v=v, bias=bias, padding_mask=padding_mask, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k
    )
    if bias is not None:
        _expect_bias(bias, (sizes["B"], heads, sizes["Tq"], sizes["Tk"]))
    if padding_mask is not None:
        if cu_seqlens is not None:
            raise PackingError("cu_seqlens and padding_mask came together; pass one: packing already has no padding")
        expect_padding_mask(padding_mask, sizes["B"], sizes["Tk"])
    cu_seqlens_k = _expect_packing(cu_seqlens, cu_seqlens_k, sizes)
    facts = {
        "auto": backend == "auto",
        "packed": cu_seqlens is not None,
        "empty": q.numel() == 0 or k.numel() == 0 or v.numel() == 0,
        "bias_dtype": None if bias is None else bias.dtype,
        "dtype": q.dtype,
        "widest": max(sizes["P"], sizes["Pv"]),
    }
    attend = select("softmax_attention", backend, (q, k, v, bias), facts)
    y: Tensor = attend(
        q,
        k,
        v,
        causal=causal,
        scale=sizes["P"] ** -0.5 if scale is None else float(scale),
        bias=bias,
        padding_mask=padding_mask,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
    )
    return y


def flops(batch: int, queries: int, keys: int, heads: int, head_dim: int, value_dim: int | None = None) -> int:
    """Matrix-product FLOPs of the forward, 2 per multiply-add: 4 B H Tq Tk P of the full matrix, causal or not."""
    return 2 * batch * heads * queries * keys * (head_dim + (head_dim if value_dim is None else value_dim))


def _expect_bias(bias: Tensor, full: tuple[int, int, int, int]) -> None:
    if bias.dtype != torch.bool:
        expect_floating("bias", bias)
    wide = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if bias.dim() > 4 or any(size not in (1, wanted) for size, wanted in zip(wide, full, strict=True)):
        raise ShapeError(f"bias has shape {list(bias.shape)}, wanted one that broadcasts to [B,H,Tq,Tk]={list(full)}")


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
                f"q has Tq={sizes['Tq']} packed tokens, k has Tk={sizes['Tk']}; pass cu_seqlens_k, [S+1], for the keys"
            )
        return cu_seqlens
    expect_cu_seqlens(cu_seqlens_k, sizes["Tk"], sizes["B"])
    if cu_seqlens_k.shape != cu_seqlens.shape:
        raise PackingError(
            f"cu_seqlens has {cu_seqlens.numel() - 1} sequences, cu_seqlens_k {cu_seqlens_k.numel() - 1}; "
            "queries and keys must have the same number"
        )
    return cu_seqlens_k


def _triton_refuses(
    auto: bool, packed: bool, empty: bool, bias_dtype: torch.dtype | None, widest: int, **_: Any
) -> str | None:
    if bias_dtype is not None:
        return "takes no bias"
    if widest > MAX_HEAD_WIDTH:
        return f"takes heads of up to {MAX_HEAD_WIDTH} channels, these have {widest}"
    if empty:
        return "an input is empty"
    if auto and not packed:
        return "torch's own kernels are faster on inputs that are not packed; ask for it by name"
    return None


def _sdpa_refuses(empty: bool, bias_dtype: torch.dtype | None, dtype: torch.dtype, **_: Any) -> str | None:
    if empty:
        return "an input is empty"
    if bias_dtype is not None and bias_dtype not in (torch.bool, dtype):
        return f"would round the bias from {bias_dtype} to {dtype}"
    return None


register_backend("softmax_attention", Serves("reference"), reference.softmax_attention_reference, priority=REFERENCE)
register_backend("softmax_attention", Serves("chunked"), chunked.softmax_attention_chunked, priority=PLAIN - 1)
register_backend(
    "softmax_attention", Serves("sdpa"), sdpa.softmax_attention_sdpa, refuses=_sdpa_refuses, priority=PLAIN
)
register_backend(
    "softmax_attention",
    Serves("triton", devices=("cuda",), dtypes=("float32", "bfloat16", "float16"), needs=("triton",)),
    softmax_attention_triton,
    refuses=_triton_refuses,
    priority=KERNEL,
)

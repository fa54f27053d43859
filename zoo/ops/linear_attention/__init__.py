"""Linear attention: exp(<q,k>) replaced by <phi(q), phi(k)>, causal with or without decay, or over all tokens.

Source: Katharopoulos et al. 2020 (arXiv 2006.16236); decay per head: Sun et al. 2023 (retention); decay per channel:
Yang et al. 2024 (gated linear attention).
"""

from __future__ import annotations

from torch import Tensor

from sequence_mixer.errors import ConfigError, DtypeError, PackingError, ShapeError
from sequence_mixer.shapes import (
    accumulation_dtype,
    expect_cu_seqlens,
    expect_floating,
    expect_padding_mask,
    expect_same_device,
    expect_shape,
)
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select, without_autocast
from zoo.ops.linear_attention.chunked import linear_attention_chunked
from zoo.ops.linear_attention.cost import flops
from zoo.ops.linear_attention.feature_map import FEATURE_MAPS, expect_feature_map
from zoo.ops.linear_attention.reference import linear_attention_reference
from zoo.ops.linear_attention.triton_path import linear_attention_triton, refuses
from zoo.ops.semiseparable.triton_path import KERNEL_DTYPES

__all__ = ["FEATURE_MAPS", "flops", "linear_attention"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    feature_map: str = "identity",
    causal: bool = True,
    normalize: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = exp(log_decay_t) S_{t-1} + phi(k_t) v_t^T and y_t = scale S_t^T phi(q_t), one state [N,P] per head.

    q: [B,T,H,N]. k: [B,T,G,N], v: [B,T,G,P], of the dtype of q; query head h reads group h // (H / G). With
        causal=False and without packing k and v may have another number of tokens, [B,K,G,...].
    log_decay: [B,T,H], or [B,T,H,N] for a decay per key channel; natural log, <= 0, -inf forgets everything. Needs
        causal=True. May be float32 beside half precision inputs.
    feature_map: phi, elementwise, computed in the accumulation dtype: "identity", "elu_plus_one" (x + 1 above 0,
        exp(x) below), "relu", "silu" or "squared_relu".
    causal: False for one sum over all (real) tokens, read by every query.
    normalize: y_t = num / (den + eps), where den is what a value of 1 everywhere would give; the state then has a
        last column sum phi(k). Features should be positive: nothing keeps the denominator of others away from 0.
    scale: factor of the products <phi(q), phi(k)>, applied after the map; under `normalize` it is a factor of both
        num and den, so that it only changes the weight of eps. States do not contain it.
    padding_mask: bool [B,T] ([B,K] of the keys), True = real, one run per row. What stands in padded slots (NaN too)
        does not matter; the state is the one after the real tokens. With as many queries as keys it also says which
        queries are real: padded rows of y are 0.
    initial_state: [B,H,N,P] ([B,H,N,P+1] if `normalize`), with S in place of B under `cu_seqlens`; None for zeros.
        Needs causal=True.
    cu_seqlens: int [S+1], boundaries of S sequences packed in one row (B = 1); empty sequences are legal.
    backend: "auto", "triton" (causal, decay per head or none), "chunked" or "reference".
    Returns y [B,T,H,P] in the dtype of v and the final state (the total sum if causal=False), shaped like
    `initial_state`, in the accumulation dtype.
    Raises ShapeError, DtypeError, DeviceError, PackingError, BackendError; ConfigError for options that do not go
    together or an unknown feature map.
    """
    sizes = _check(q, k, v, log_decay, causal, normalize, padding_mask, initial_state, cu_seqlens)
    expect_feature_map(feature_map)
    inner = accumulation_dtype(v.dtype)
    log_decay = None if log_decay is None else log_decay.to(inner)
    initial_state = None if initial_state is None else initial_state.to(inner)
    padded_queries = None
    if padding_mask is not None:
        padded = ~padding_mask[:, :, None, None]
        k, v = k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0)
        if sizes["T"] == sizes["K"]:
            padded_queries = padded
            q = q.masked_fill(padded, 0.0)
        if log_decay is not None:
            log_decay = log_decay.masked_fill(padded if log_decay.dim() == 4 else padded[..., 0], 0.0)
    facts = {
        "causal": causal,
        "channel_decay": log_decay is not None and log_decay.dim() == 4,
        "N": sizes["N"],
        "P": sizes["P"],
    }
    fn = select("linear_attention", backend, (v, q, k, log_decay, initial_state), facts)
    with without_autocast(v):
        y, final_state = fn(
            q, k, v, log_decay, feature_map, causal, normalize, eps, scale, padding_mask, initial_state, cu_seqlens
        )
        if padded_queries is not None:
            y = y.masked_fill(padded_queries, 0.0)
    return y, final_state


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    causal: bool,
    normalize: bool,
    padding_mask: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> dict[str, int]:
    """Check everything that does not depend on the implementation; returns sizes by letter (K keys, S sequences)."""
    expect_floating("q", q)
    sizes = expect_shape("q", q, "B T H N")
    if causal or cu_seqlens is not None:
        expect_shape("k", k, "B T G N", sizes)
    sizes = expect_shape("k", k, "B K G N", sizes)
    sizes = expect_shape("v", v, "B K G P", sizes)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise DtypeError(f"q is {q.dtype}, k is {k.dtype} and v is {v.dtype}; cast them to one dtype")
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ShapeError(f"q has H={sizes['H']} heads, wanted a multiple of the G={sizes['G']} heads of k and v")
    if min(sizes["H"], sizes["P"], sizes["N"]) == 0:
        raise ShapeError(f"q is {list(q.shape)} and v is {list(v.shape)}; H, N and P must be at least 1")
    sizes["S"] = sizes["B"]
    if cu_seqlens is not None:
        if padding_mask is not None:
            raise PackingError("cu_seqlens and padding_mask came together; pass one: packing already has no padding")
        sizes["S"] = expect_cu_seqlens(cu_seqlens, sizes["T"], sizes["B"])
    if padding_mask is not None:
        expect_padding_mask(padding_mask, sizes["B"], sizes["K"])
    for argument, tensor in (("log_decay", log_decay), ("initial_state", initial_state)):
        if tensor is not None and not causal:
            raise ConfigError(f"{argument} came with causal=False, where tokens have no order; leave one out")
    if log_decay is not None:
        expect_floating("log_decay", log_decay)
        expect_shape("log_decay", log_decay, "B T H N" if log_decay.dim() == 4 else "B T H", sizes)
    if initial_state is not None:
        expect_floating("initial_state", initial_state)
        expect_shape("initial_state", initial_state, f"S H N {sizes['P'] + normalize}", sizes)
    expect_same_device(
        q, k=k, v=v, log_decay=log_decay, padding_mask=padding_mask, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    return sizes


register_backend(
    "linear_attention",
    Serves("triton", ("cuda",), KERNEL_DTYPES, needs=("triton",)),
    linear_attention_triton,
    refuses=refuses,
    priority=KERNEL,
)
register_backend("linear_attention", Serves("chunked"), linear_attention_chunked, priority=PLAIN)
register_backend("linear_attention", Serves("reference"), linear_attention_reference, priority=REFERENCE)
